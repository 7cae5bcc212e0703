"""The baselines compute the same losses as one device: two gloo processes, dropout off."""

from __future__ import annotations

from typing import Any

import torch

from autopar.runtime.launch import run_processes
from benchmarks.baselines import BASELINES
from benchmarks.suites import build
from benchmarks.training import Job, NotAvailable, make_optimizer, training_step

STEPS = 2
# Of these nothing but numbers of rows and devices decides what is available.
MODELS = ("gpt-tiny", "llama-tiny", "moe-tiny", "t5-tiny", "wresnet-tiny", "unet-tiny")
ONE_DEVICE = ("torch.compile", "torch.compile, reduce-overhead")


def _job(name: str, rank: int, size: int) -> Job:
    model, batch = build(name, 4)
    return Job(
        lambda: build(name, 4)[0].eval(), type(model), batch, torch.device("cpu"), rank, size
    )


def _losses(step: Any) -> list[float]:
    return [float(step()) for _ in range(STEPS)]


def _every_baseline(world: Any) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    found = {}
    for name in MODELS:
        for baseline, maker in BASELINES.items():
            try:
                found[f"{name} {baseline}"] = _losses(maker(_job(name, world.rank, world.size)))
            except NotAvailable:
                continue
    return found


def test_losses_are_those_of_one_device() -> None:
    per_rank = run_processes(_every_baseline, 2)
    missing = []
    for name in MODELS:
        job = _job(name, 0, 1)
        model = job.build()
        optimizer = make_optimizer(model.parameters(), job.device)
        expected = torch.tensor(_losses(training_step(job, model, job.batch, optimizer)))
        for baseline in BASELINES:
            key = f"{name} {baseline}"
            if key not in per_rank[0]:
                missing.append(key)
                continue
            ranks = torch.tensor([losses[key] for losses in per_rank])
            torch.testing.assert_close(ranks.mean(0), expected, rtol=1e-5, atol=0)
    available = {key.split(" ", 1)[1] for key in per_rank[0]}
    assert set(BASELINES) - available == {*ONE_DEVICE, "fsdp x tp"}
    assert [key for key in missing if key.startswith("unet") and "1f1b" in key]
