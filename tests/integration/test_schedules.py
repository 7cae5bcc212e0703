"""Real processes (gloo) under the schedules that share devices or split backward."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch

from autopar.runtime.launch import run_processes
from autopar.schedule import ScheduleKind
from tests.integration import workers
from tests.unit.runtime.reference import Expected, expected_step, worst_error

# Meshes by stage, on two processes. GPT-2 ties its embedding to its head, in the last stage. On one
# worker of two devices all transfers are between the worker's own ranks.
CASES: dict[str, tuple[Any, ...]] = {
    "2 workers x 2 chunks": ("gpt2", [(1,)] * 4, "", None, ScheduleKind.INTERLEAVED, 2),
    "1 worker x 2 chunks": ("gpt2", [(2,)] * 2, "", None, ScheduleKind.INTERLEAVED, 1),
    # a value of the first stage waits for its turn behind those of stages after it
    "skip connections": ("unet", [(1,)] * 6, "", None, ScheduleKind.INTERLEAVED, 2),
    "zero bubble": ("gpt2", [(1,)] * 2, "", None, ScheduleKind.ZB_H1),
}


@cache
def _ranks() -> list[list[dict[str, Any]]]:
    return run_processes(workers.steps_of, 2, list(CASES.values()), timeout=timedelta(seconds=60))


@cache
def _expected(model: str) -> Expected:
    return expected_step(workers.cached_case(model), seed=workers.SEED)


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_one_device(name: str) -> None:
    number = list(CASES).index(name)
    want = _expected(CASES[name][0])
    merged: dict[str, torch.Tensor] = {}
    for rank in _ranks():
        assert torch.allclose(rank[number]["loss"], want.loss, rtol=1e-10)
        for key, value in rank[number]["gradients"].items():
            assert torch.equal(merged.setdefault(key, value), value), key
    error, worst = worst_error(merged, want.gradients)
    assert error <= 1e-10, worst
