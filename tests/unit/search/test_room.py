"""Schedules that hold more than 1F1B does: stages are solved again with room for them."""

from __future__ import annotations

import pytest
import torch

from autopar.api import plan_model
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.schedule import ScheduleKind
from cost_models import Cluster
from tests.unit.test_regimes import Stack


def planned(budget: str) -> ParallelPlan:
    with torch.device("meta"):
        model, batch = Stack(4, 512), torch.empty(1024, 512)
    options = SearchOptions(
        num_stages=4,
        num_microbatches=8,
        mesh_shape=(2,),
        remat=Remat.NONE,
        candidates=1,
        cache=False,
    )
    cluster = Cluster.parse("h100:1x8")
    return plan_model(model, batch, cluster, memory_budget=budget, options=options)[0]


@pytest.mark.parametrize("mib", [48, 47])
def test_a_faster_schedule_gets_room(mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tables' best cut is first solved, ZB-H1 would hold 50 MiB. The oracle looks at every
    cut under every schedule."""
    oracle = planned(f"{mib}MiB")
    monkeypatch.setattr("autopar.planner.is_small", lambda *_: False)
    found = planned(f"{mib}MiB")
    assert found.schedule is ScheduleKind.ZB_H1
    assert oracle.step_s <= found.step_s < 1.03 * oracle.step_s
    assert all(stage.prediction.peak_bytes <= mib * 2**20 for stage in found.stages)
