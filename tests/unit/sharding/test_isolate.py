"""Work in a fork: its result, its error, its crash, its end, and its time limit."""

from __future__ import annotations

import os
import time

import pytest
import torch

from autopar.errors import RuleError
from autopar.sharding.isolate import Crashed, isolated


def test_result_and_state_stay_apart() -> None:
    seen: list[int] = []
    before = torch.random.get_rng_state()

    def work() -> bytes:
        seen.append(1)
        torch.manual_seed(7)
        return b"x" * 200_000  # more than a pipe holds

    assert isolated(work, 30) == b"x" * 200_000
    assert not seen and torch.equal(torch.random.get_rng_state(), before)


def test_errors_come_back() -> None:
    def work() -> None:
        raise RuleError("as it is")

    with pytest.raises(RuleError, match="as it is"):
        isolated(work, 30)


def test_crashes_ends_and_hangs_are_named() -> None:
    with pytest.raises(Crashed, match="SIGABRT"):
        isolated(os.abort, 30)
    with pytest.raises(Crashed, match="ends the process"):
        isolated(lambda: os._exit(3), 30)
    started = time.monotonic()
    with pytest.raises(Crashed, match="longer than 0 s"):
        isolated(lambda: time.sleep(60), 0.2)
    assert time.monotonic() - started < 30
