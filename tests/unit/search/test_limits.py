"""A search that is ended early: the best plan so far, with a note, and not kept for later."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.graph.layers import cluster_layers
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.planner import make_plan
from autopar.search.exact import ExactSolver
from autopar.search.solved import SolvedCut
from cost_models import Cluster
from tests.unit.intraop.stages import gpt2_graph


def planned(**options: Any) -> ParallelPlan:
    graph = gpt2_graph(4, 16, 2, n_embd=32, n_head=4, n_positions=16, vocab_size=64)
    graph = cluster_layers(graph, None)
    cluster, given = Cluster.parse("h100:1x2"), SearchOptions(**options)
    return make_plan(graph, cluster, num_microbatches=4, options=given)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the planner keeps for later; nothing is found there."""
    found: list[object] = []
    monkeypatch.setattr("autopar.planner.remembered_plan", lambda key: None)
    monkeypatch.setattr("autopar.planner.remember_plan", lambda *plan: found.append(plan))
    return found


def test_the_time_limit(kept: list[object]) -> None:
    plan = planned(time_limit_s=1e-3)
    assert plan.search.notes == ("time limit of 0.001 s: the best plan so far",)
    assert plan.search.gap >= 0 and kept == []


def test_an_interrupt_after_the_first_plan(
    kept: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = ExactSolver.solve
    solved: list[SolvedCut] = []

    def interrupted(*arguments: Any, **options: Any) -> SolvedCut:
        if solved:
            raise KeyboardInterrupt
        solved.append(solve(*arguments, **options))
        return solved[-1]

    monkeypatch.setattr(ExactSolver, "solve", interrupted)
    monkeypatch.setattr(ExactSolver, "fastest", interrupted)
    plan = planned()
    assert plan.search.notes == ("interrupted: the best plan so far",)
    assert plan.step_s == solved[0].candidate.step_s and kept == []


def test_an_interrupt_before_any_plan(kept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> SolvedCut:
        raise KeyboardInterrupt

    monkeypatch.setattr(ExactSolver, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned()
    assert kept == []
