"""Every cut of a small problem: which problems are small, what is not looked at, when it ends."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from autopar.api import ModelWorkload
from autopar.graph.family import GraphFamily
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.planner import find_plan
from autopar.schedule import ScheduleKind
from autopar.search.cuts import CutSearch
from autopar.search.exact import ExactSolver
from autopar.search.thorough import ThoroughSearch
from benchmarks.exhaustive import random_instance

torch.set_num_threads(1)
INSTANCE = random_instance(1)  # 4 layers on 2 nodes of one device, 1 or 2 microbatches


@cache
def workload() -> ModelWorkload:
    return ModelWorkload(GraphFamily(INSTANCE.model, INSTANCE.batch), INSTANCE.counts)


def planned(**options: Any) -> ParallelPlan:
    given = SearchOptions(cache=False, **options)
    return find_plan(workload(), INSTANCE.cluster, options=given)


def without(monkeypatch: pytest.MonkeyPatch, **options: Any) -> ParallelPlan:
    """The plan of a search that does not look at every cut."""
    with monkeypatch.context() as patch:
        patch.setattr("autopar.planner.is_small", lambda *_: False)
        return planned(**options)


def test_it_finds_better_plans_and_solves_few_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[object] = []
    fastest = ExactSolver.fastest

    def counted(*arguments: Any) -> Any:
        solved.append(arguments)
        return fastest(*arguments)

    rough = without(monkeypatch)
    monkeypatch.setattr(ExactSolver, "fastest", counted)
    plan = planned()
    runs_of_layers, views, policies = 10, 2, 3
    assert plan.step_s < rough.step_s * (1 - 1e-3)
    assert 0 < len(solved) < runs_of_layers * views * policies * len(INSTANCE.counts) / 2


def test_it_keeps_to_the_pins() -> None:
    free = planned(num_stages=2, schedule=ScheduleKind.ONE_F_ONE_B)
    assert len(free.stages) == 2 and free.schedule is ScheduleKind.ONE_F_ONE_B
    turns = planned(num_stages=2, schedule=ScheduleKind.INTERLEAVED, num_microbatches=2)
    assert turns.schedule is ScheduleKind.INTERLEAVED and turns.num_workers == 2


@pytest.mark.parametrize("after", ["interrupt", "time limit"])
def test_ended_early_it_keeps_what_it_found(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rough = without(monkeypatch)
    look = ThoroughSearch._look

    def once(search: ThoroughSearch, cut: Any) -> None:
        look(search, cut)
        if search._step_s < rough.step_s * (1 - 1e-6) and after == "interrupt":
            raise KeyboardInterrupt
        if search._step_s < rough.step_s * (1 - 1e-6):
            search._exact.clock.limit_s = 0.0

    monkeypatch.setattr(ThoroughSearch, "_look", once)
    plan = planned()
    assert plan.step_s < rough.step_s
    assert any(after in note for note in plan.search.notes), plan.search.notes


def test_bounds_are_none_above_what_stages_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers take alone is at most what a stage of them takes."""
    least: list[float] = []
    found: list[float] = []
    fastest, seconds = ExactSolver.fastest, CutSearch.least_seconds
    tables: list[CutSearch] = []

    def kept(search: CutSearch, *arguments: Any) -> float:
        tables.append(search)
        return seconds(search, *arguments)

    def compared(exact: ExactSolver, run: Any, cut: Any, stage: int, view: Any) -> Any:
        solution = fastest(exact, run, cut, stage, view)
        bounds, count = (*cut.first_layers, 4), cut.num_microbatches
        least.append(seconds(tables[-1], view, count, bounds[stage], bounds[stage + 1], 1))
        p = solution.prediction
        found.append(p.forward_s + p.backward_s + p.step_s / count)
        return solution

    monkeypatch.setattr(CutSearch, "least_seconds", kept)
    monkeypatch.setattr(ExactSolver, "fastest", compared)
    planned()
    assert found and all(a <= b * (1 + 1e-9) for a, b in zip(least, found, strict=True))
