"""Clusters of several device kinds: plans use each for what it is worth, and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopar.api import plan_model
from autopar.errors import NoFeasiblePlan
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.report.text import plan_text
from autopar.verify import verify_plan
from cost_models import Cluster

TWO_KINDS = Cluster.from_toml(Path(__file__).parent.parent / "clusters" / "two_kinds.toml")


class Stack(nn.Module):
    """Equal layers, so that their number says how much a stage does."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.pow(2).mean()


def planned(model: nn.Module, batch: Tensor, num_stages: int | None = None) -> ParallelPlan:
    options = SearchOptions(num_microbatches=4, num_stages=num_stages)
    return plan_model(model, batch, TWO_KINDS, options=options)[0]


def kind(devices: tuple[int, ...]) -> str:
    (group,) = {g for g in range(2) for rank in devices if rank in TWO_KINDS.ranks(g)}
    return TWO_KINDS.groups[group].device.name


def test_a_plan_for_two_kinds_runs() -> None:
    model, batch = Stack(8, 32), torch.randn(16, 32)
    plan = planned(model, batch)
    layers = dict.fromkeys(("fast", "slow"), 0)
    for stage in plan.stages:
        layers[kind(stage.devices)] += stage.last_layer - stage.first_layer + 1
    assert layers["fast"] >= layers["slow"] > 0  # 6 of 10 in the ratio of their speeds
    report = verify_plan(model, batch, plan)
    assert report.ok, report
    assert "of fast" in plan_text(plan) and "of slow" in plan_text(plan)


def test_each_kind_is_a_stage_at_least() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"no 1 stage .* exactly 2 \+ 4 devices"):
        planned(Stack(2, 8), torch.randn(8, 8), num_stages=1)


def test_each_stage_is_priced_on_its_own_kind() -> None:
    plan = planned(Stack(6, 32), torch.randn(16, 32), num_stages=2)
    per_layer = {}
    for stage in plan.stages:
        p, count = stage.prediction, stage.last_layer - stage.first_layer + 1
        per_layer[kind(stage.devices)] = (p.forward_s + p.backward_s) * len(stage.devices) / count
    assert per_layer["slow"] > 1.5 * per_layer["fast"]
