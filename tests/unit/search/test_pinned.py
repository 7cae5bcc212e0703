"""A search told nothing is never worse than one that is told a schedule and microbatches."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from autopar.api import plan_model
from autopar.graph.precision import Precision
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.schedule import ScheduleKind
from benchmarks.models.wide_resnet import WideResNet, WideResNetConfig
from cost_models import Cluster

_ROUNDING = 1 + 1e-9


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every cut is looked at."""
    monkeypatch.setattr("autopar.planner.is_small", lambda *_: False)


@cache
def planned(
    rows: int, num_microbatches: int | None = None, schedule: ScheduleKind | None = None
) -> ParallelPlan:
    """Of seven blocks whose gradients are large and which do not make two equal stages."""
    with torch.device("meta"):
        model = WideResNet(WideResNetConfig(320, 2, (1, 1, 4, 1)))
        batch = torch.empty(rows, 3, 224, 224), torch.zeros(rows, dtype=torch.long)
    options = SearchOptions(
        num_microbatches=num_microbatches, schedule=schedule, microbatch_limit=8, cache=False
    )
    precision = Precision.parse("bf16/bf16")
    return plan_model(
        model, batch, Cluster.parse("h100:1x2"), precision=precision, options=options
    )[0]


@pytest.mark.parametrize(
    ("rows", "count", "schedule"),
    [
        (32, 4, ScheduleKind.INTERLEAVED),
        (32, 4, ScheduleKind.ZB_H1),
        (64, 4, ScheduleKind.ZB_H1),
    ],
)
def test_no_pin_is_faster(rows: int, count: int, schedule: ScheduleKind | None) -> None:
    assert planned(rows).step_s <= planned(rows, count, schedule).step_s * _ROUNDING


def test_an_interleaved_pipeline_is_found_where_no_plain_one_wins() -> None:
    assert planned(32).schedule is ScheduleKind.INTERLEAVED
    assert planned(32).step_s < 0.99 * planned(32, 4, ScheduleKind.ZB_H1).step_s
