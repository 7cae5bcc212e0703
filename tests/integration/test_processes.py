"""Real processes (gloo): two stages of two ranks against the virtual run and torch itself."""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import RuntimeFailure
from autopar.lowering.lower import lower_plan
from autopar.runtime.launch import run_processes
from autopar.runtime.simulated import VirtualRun
from tests.integration import failing, workers
from tests.unit.runtime.reference import worst_error

MODELS = ("gpt2", "wide_resnet", "llama", "uneven gpt2 on hosts")
TIMEOUT = timedelta(seconds=60)


@cache
def _ranks() -> list[dict[str, dict[str, Any]]]:
    """Per rank: what `workers.train` gives, by model."""
    with tempfile.TemporaryDirectory() as folder:
        return run_processes(workers.train_all, 4, MODELS, folder, timeout=TIMEOUT)


def _merged(name: str, what: str) -> dict[str, torch.Tensor]:
    """Whole tensors of all stages; ranks of one stage must agree exactly."""
    merged: dict[str, torch.Tensor] = {}
    for rank in _ranks():
        for key, value in rank[name][what].items():
            assert torch.equal(merged.setdefault(key, value), value), key
    return merged


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_virtual_run(name: str) -> None:
    case, plan = workers.make_case(name)
    run = VirtualRun(lower_plan(case.graph, plan), case.graph, case.parameters, case.buffers)
    run.attach(lambda shards: torch.optim.AdamW(shards, lr=workers.RATE))
    want = run.step(case.leaves, workers.SEED)
    for rank in _ranks():
        assert torch.allclose(rank[name]["loss"], want.loss, rtol=1e-12)
    error, worst = worst_error(_merged(name, "gradients"), want.gradients)
    assert error <= 1e-10, worst
    buffers = _merged(name, "buffers")  # also those that no program reads
    error, worst = worst_error({key: buffers[key] for key in want.buffers}, want.buffers)
    assert error <= 1e-10, worst

    plain = [nn.Parameter(case.parameters[n]) for n in want.gradients]
    for parameter, gradient in zip(plain, want.gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    maximum = torch.nn.utils.get_total_norm(list(want.gradients.values()), float("inf"))
    norm = torch.nn.utils.clip_grad_norm_(plain, workers.MAX_NORM)
    assert norm > workers.MAX_NORM
    for rank in _ranks():
        assert torch.allclose(rank[name]["norm"], norm, rtol=1e-10)
        clipped_maximum = maximum * workers.MAX_NORM / (norm + 1e-6)
        assert torch.allclose(rank[name]["maximum"], clipped_maximum, rtol=1e-10)
    clipped = dict(zip(want.gradients, (p.grad for p in plain), strict=True))
    error, worst = worst_error(_merged(name, "clipped"), clipped)  # type: ignore[arg-type]
    assert error <= 1e-10, worst

    run.scale_gradients(float(workers.MAX_NORM / (norm + 1e-6)))
    run.update()
    error, worst = worst_error(_merged(name, "parameters"), run.parameters())
    assert error <= 1e-6, worst  # Adam divides zero-but-for-rounding by itself
    second = run.step(case.leaves, workers.SEED + 1)
    for rank in _ranks():  # with the rows of data_shard alone, then with the whole batch
        assert torch.allclose(rank[name]["second"], second.loss, rtol=1e-6)
    doubled = {n: 2 * g for n, g in second.gradients.items()}
    error, worst = worst_error(_merged(name, "doubled"), doubled)
    assert error <= 1e-4, worst


@pytest.mark.parametrize("name", MODELS)
def test_names_of_all_ranks_are_those_of_the_model(name: str) -> None:
    case, _ = workers.make_case(name)
    names = {key for rank in _ranks() for key in rank[name]["names"]}
    assert names == case.model.state_dict().keys()


@pytest.mark.parametrize("kind", ["raise", "die"])
def test_a_failing_rank_takes_the_job_down_with_its_own_error(kind: str, tmp_path: Path) -> None:
    clock = tmp_path / "failed_at"
    message = f"rank 2 .*{failing.PULLED}" if kind == "raise" else "rank 2 .*exit code 7"
    with pytest.raises(RuntimeFailure, match="(?s)" + message):
        run_processes(failing.fail_mid_step, 4, 2, kind, str(clock), timeout=TIMEOUT)
    assert time.time() - float(clock.read_text(encoding="utf-8")) < 30


def test_objects_barriers_and_a_plan_of_another_size() -> None:
    assert run_processes(failing.exchange, 2, timeout=TIMEOUT) == [{"from": 0}, {"from": 0}]


def test_who_uses_groups_last_is_released_first() -> None:
    assert run_processes(failing.released, 1, timeout=TIMEOUT) == [[2, 0]]
