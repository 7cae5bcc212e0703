"""Which kernel is chosen, from times that are made up; what is kept; what ranks agree on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from autopar.cache import read_record, write_record
from autopar.ops import cublaslt
from autopar.ops.cublaslt import Epilogue, Problem
from autopar.runtime import choices
from autopar.runtime.choices import FastestKernels, _times
from autopar.runtime.comm import World

BF16 = torch.bfloat16
LARGE = Problem(0, BF16, BF16, 4096, 4096, 4096, (False, True), (4096, 4096), Epilogue.NONE, 256)


class Calls:
    """Kernels that take as long as it says, in the order in which they are timed."""

    problem = LARGE

    def __init__(self, times: dict[int, list[float]]) -> None:
        self._times = {kernel: iter(seconds) for kernel, seconds in times.items()}

    def seconds(self, kernel: int, least: float) -> float:
        return next(self._times[kernel])


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cublaslt, "num_kernels", lambda _: 3)
    monkeypatch.setattr(cublaslt, "version", lambda: "cuBLASLt 130100")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that were measured; kernel 2 wins."""
    found: list[Problem] = []

    def fastest(problem: Problem) -> int:
        found.append(problem)
        return 2

    monkeypatch.setattr(choices, "_fastest", fastest)
    return found


def test_medians_of_those_that_were_near() -> None:
    times = {0: [1.0, 1.0, 1.2, 0.9], 1: [0.9, 0.8, 0.9, 2.0], 2: [1.5]}
    assert _times(Calls(times)) == {0: 1.0, 1: 0.9}  # type: ignore[arg-type]


def test_the_first_alone_is_not_timed_again() -> None:
    assert _times(Calls({0: [1.0], 1: [1.2], 2: [1.5]})) == {0: 1.0}  # type: ignore[arg-type]


@pytest.mark.parametrize(("second", "chosen"), [(0.97, 1), (0.99, 0), (1.1, 0)])
def test_a_kernel_must_be_faster_than_noise(
    second: float, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_Call", lambda _: None)
    monkeypatch.setattr(choices, "_times", lambda _: {0: 1.0, 1: second})
    assert choices._fastest(LARGE) == chosen


def test_no_memory_to_time_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Problem) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(choices, "_Call", fails)
    assert FastestKernels(None)(LARGE) == 0
    assert read_record("kernels", choices._key(LARGE)) is None  # there may be some next time


def test_choices_are_kept(measured: list[Problem]) -> None:
    assert [FastestKernels(None)(LARGE) for _ in range(2)] == [2, 2]
    assert measured == [LARGE]


@pytest.mark.parametrize("record", ["nonsense", 3, -1, [2], None])
def test_what_is_no_kernel_is_found_anew(record: object, measured: list[Problem]) -> None:
    write_record("kernels", choices._key(LARGE), record)
    assert FastestKernels(None)(LARGE) == 2 and measured == [LARGE]
    assert read_record("kernels", choices._key(LARGE)) == 2


def test_small_products_are_not_timed(measured: list[Problem]) -> None:
    small = Problem(0, BF16, BF16, 64, 64, 64, (False, False), (64, 64), Epilogue.NONE, 256)
    assert FastestKernels(None)(small) == 0 and not measured


def test_what_was_agreed_is_kept(measured: list[Problem]) -> None:
    """And nothing is taken that is not in the list here."""
    world = object.__new__(World)
    world._store, world._number = HashStore(), 0  # type: ignore[assignment]
    key = choices._key(LARGE)
    assert world.agree(f"kernel/{key}", lambda: 1) == 1
    assert FastestKernels(world)(LARGE) == 1 and not measured
    assert read_record("kernels", key) == 1
    other = replace(LARGE, m=8192)
    world.agree(f"kernel/{choices._key(other)}", lambda: 3)
    assert FastestKernels(world)(other) == 0
    assert read_record("kernels", choices._key(other)) is None


def test_the_first_to_ask_decides() -> None:
    store = HashStore()
    worlds = [object.__new__(World) for _ in range(2)]
    for world in worlds:
        world._store, world._number = store, 0  # type: ignore[assignment]
    assert worlds[0].agree("this", lambda: 5) == 5
    assert worlds[1].agree("this", lambda: 7) == 5
    assert worlds[1].agree("that", lambda: 7) == 7
