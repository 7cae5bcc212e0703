"""The baselines compute the same losses as one device: two gloo processes, dropout off."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from autopar.runtime.launch import run_processes
from benchmarks.baselines import BASELINES
from benchmarks.suites import build
from benchmarks.training import Job, MasterWeights, NotAvailable, make_optimizer, training_step

STEPS = 2
ONE_DEVICE = ("torch.compile", "torch.compile, reduce-overhead")
# What is particular to each model; the rest is the same code for all.
MODELS = {
    "gpt-tiny": tuple(BASELINES),
    "llama-tiny": ("tensor parallel, checkpointed", "1f1b"),
    "moe-tiny": ("1f1b", "tensor parallel"),
    "t5-tiny": ("zero-3, checkpointed", "1f1b"),
    "wresnet-tiny": ("ddp bf16", "1f1b"),
    "unet-tiny": ("zero-2", "1f1b"),
}
NOT_AVAILABLE = {
    *(("gpt-tiny", name) for name in (*ONE_DEVICE, "fsdp x tp")),
    ("moe-tiny", "tensor parallel"),
    ("unet-tiny", "1f1b"),
}


def _job(name: str, rank: int, size: int) -> Job:
    model, batch = build(name, 4)
    return Job(
        lambda: build(name, 4)[0].eval(), type(model), batch, torch.device("cpu"), rank, size
    )


def _losses(step: Any) -> list[float]:
    return [float(step()) for _ in range(STEPS)]


def _every_baseline(world: Any) -> dict[tuple[str, str], list[float]]:
    torch.set_num_threads(1)
    found = {}
    for name, baselines in MODELS.items():
        for baseline in baselines:
            with contextlib.suppress(NotAvailable):
                step = BASELINES[baseline](_job(name, world.rank, world.size))
                found[name, baseline] = _losses(step)
    return found


def test_losses_are_those_of_one_device() -> None:
    per_rank = run_processes(_every_baseline, 2)
    wanted = {(name, baseline) for name, found in MODELS.items() for baseline in found}
    assert wanted - set(per_rank[0]) == NOT_AVAILABLE
    for name in MODELS:
        job = _job(name, 0, 1)
        model = job.build()
        optimizer = make_optimizer(model.parameters(), job.device)
        expected = torch.tensor(_losses(training_step(job, model, job.batch, optimizer)))
        for key in (key for key in per_rank[0] if key[0] == name):
            ranks = torch.tensor([losses[key] for losses in per_rank])
            torch.testing.assert_close(ranks.mean(0), expected, rtol=1e-5, atol=0)


def test_one_device_has_the_losses_of_eager_mode_and_masters_follow_float32() -> None:
    job = replace(_job("gpt-tiny", 0, 1), half=False)
    model = job.build()
    plain = training_step(job, model, job.batch, make_optimizer(model.parameters(), job.device))
    expected = _losses(plain)
    assert _losses(BASELINES["torch.compile"](job)) == pytest.approx(expected, rel=1e-5)
    twin = job.build()
    step = training_step(job, twin, job.batch, MasterWeights(twin, torch.float32, job.device))
    assert _losses(step) == pytest.approx(expected, rel=1e-6)
