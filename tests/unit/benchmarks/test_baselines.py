"""The baselines compute the same losses as one device: two gloo processes, dropout off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopar.runtime.launch import run_processes
from benchmarks.baselines import BASELINES, Job, training_step
from benchmarks.suites import build

STEPS = 3
MODELS = ("gpt-tiny", "llama-tiny")


def _model(name: str) -> tuple[nn.Module, Any]:
    model, batch = build(name, 4)
    return model.eval(), batch


def _losses(step: Any) -> list[float]:
    return [float(step()) for _ in range(STEPS)]


def _every_baseline(world: Any) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    found = {}
    for name in MODELS:
        for baseline, maker in BASELINES.items():
            model, batch = _model(name)
            job = Job(model, batch, torch.device("cpu"), world.rank, world.size)
            found[f"{name} {baseline}"] = _losses(maker(job))
    return found


def test_losses_are_those_of_one_device() -> None:
    per_rank = run_processes(_every_baseline, 2)
    for name in MODELS:
        expected = torch.tensor(_losses(training_step(*_model(name))))
        for baseline in BASELINES:
            ranks = torch.tensor([losses[f"{name} {baseline}"] for losses in per_rank])
            torch.testing.assert_close(ranks.mean(0), expected, rtol=1e-5, atol=0)
