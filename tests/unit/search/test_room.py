"""ZB-H1 holds more than 1F1B does: stages are solved again with room for it."""

from __future__ import annotations

import pytest
import torch

from autopar.api import plan_model
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.schedule import ScheduleKind
from cost_models import Cluster
from tests.unit.test_regimes import Stack

_MIB = 2**20


def planned(mib: int, schedule: ScheduleKind | None = None) -> ParallelPlan:
    with torch.device("meta"):
        model, batch = Stack(4, 512), torch.empty(1024, 512)
    options = SearchOptions(
        num_stages=4,
        num_microbatches=8,
        mesh_shape=(2,),
        remat=Remat.NONE,
        schedule=schedule,
        candidates=1,
        cache=False,
    )
    cluster = Cluster.parse("h100:1x8")
    return plan_model(model, batch, cluster, memory_budget=mib * _MIB, options=options)[0]


def most_mib(plan: ParallelPlan) -> float:
    return max(stage.prediction.peak_bytes for stage in plan.stages) / _MIB


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every cut is looked at."""
    monkeypatch.setattr("autopar.planner.is_small", lambda *_: False)


@pytest.fixture(scope="module")
def fitting() -> ParallelPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autopar.planner.is_small", lambda *_: False)
        return planned(47)


@pytest.mark.usefixtures("large")
def test_a_faster_schedule_gets_room(fitting: ParallelPlan) -> None:
    """The plan without a budget is faster than what fits; 1F1B would be 18 % slower."""
    free = planned(1024)
    assert most_mib(fitting) <= 47 < most_mib(free)
    assert fitting.schedule is ScheduleKind.ZB_H1
    assert free.step_s <= fitting.step_s < 1.03 * free.step_s


@pytest.mark.usefixtures("large")
def test_a_told_schedule_is_held_against_the_budget(fitting: ParallelPlan) -> None:
    """Nothing that fits is much faster than the search's own choice."""
    assert planned(47, ScheduleKind.ZB_H1).step_s >= 0.999 * fitting.step_s


def test_every_cut_is_held_against_the_budget(fitting: ParallelPlan) -> None:
    assert planned(47).step_s >= 0.999 * fitting.step_s
