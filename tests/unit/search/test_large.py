"""Long pipelines and large clusters: equal stages are written once, few views are priced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from autopar.api import plan_model
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import make_plan
from autopar.schedule import ScheduleKind
from autopar.search import exact
from autopar.search.prices import Prices
from autopar.search.window import Window, write_window
from autopar.verify import verify_plan
from cost_models import Cluster
from tests.unit.intraop.stages import gpt2_graph
from tests.unit.search.test_window import deep


@pytest.fixture(scope="module")
def graph() -> Graph:
    found = gpt2_graph(8, 16, 4, n_embd=32, n_head=4, n_positions=16, vocab_size=64)
    return cluster_layers(found, None)


def planned(graph: Graph, cluster: str, **options: Any) -> ParallelPlan:
    given = SearchOptions(cache=False, candidates=1, **options)
    return make_plan(graph, Cluster.parse(cluster), num_microbatches=8, options=given)


def test_equal_stages_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[Window] = []

    def written(*arguments: Any, **options: Any) -> Window:
        windows.append(write_window(*arguments, **options))
        return windows[-1]

    monkeypatch.setattr(exact, "write_window", written)
    model, batch = deep()
    options = SearchOptions(
        num_stages=9,
        num_microbatches=1,
        schedule=ScheduleKind.GPIPE,
        remat=Remat.NONE,
        cache=False,
        candidates=1,
    )
    plan, _ = plan_model(model, batch, Cluster.parse("h100:1x9"), options=options)
    assert len(windows[-1].pieces) < len(plan.stages) == 9
    assert verify_plan(model, batch, plan).ok


def test_few_views_of_a_large_cluster_are_priced(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced: set[LogicalMesh] = set()
    raised = Prices.raise_levels

    def counted(self: Prices, views: Mapping[LogicalMesh, bool], *arguments: int) -> None:
        priced.update(views)
        raised(self, views, *arguments)

    monkeypatch.setattr(Prices, "raise_levels", counted)
    plan = planned(graph, "h100:16x8")
    assert len(priced) <= 24  # of 76
    assert "other numbers and sizes were not cut into stages" in plan.search.notes[-1]
