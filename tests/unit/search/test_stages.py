"""Stages solved whole: what is remembered of them, also of one that has lost a race."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autopar.errors import NoFeasiblePlan
from autopar.intraop.stage import SolverOptions, StageProgram, StageSolution
from autopar.intraop.stage_problem import StageContext
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions
from autopar.search.clock import Clock
from autopar.search.stages import ANYTHING, StageSolver, ToldStage, TooBusy, Wanted, busy_seconds
from tests.unit.intraop.stages import costs_of, stage_of

CONTEXT = StageContext(num_microbatches=8)
VIEWS = tuple(costs_of(sizes).mesh for sizes in ((4,), (2, 2)))


def solver() -> StageSolver:
    clock = Clock(60.0, lambda _: None)
    return StageSolver(SearchOptions(), lambda mesh: costs_of(mesh.axis_sizes), clock, 0.01)


def test_a_stage_that_is_too_busy_is_solved_for_whoever_asks_for_more() -> None:
    stages = solver()
    told = stage_of("mlp"), VIEWS[0], CONTEXT, math.inf
    busy_s = busy_seconds(stages.free(*told[:3]), CONTEXT.num_microbatches)
    for _ in range(2):
        with pytest.raises(TooBusy):
            stages.within(*told, Wanted(race_s=0.9 * busy_s))
    found = stages.within(*told, Wanted(race_s=1.1 * busy_s))
    assert found.seconds == stages.within(*told, ANYTHING).seconds
    assert busy_s == pytest.approx(CONTEXT.num_microbatches * found.seconds)


def test_what_is_ahead_of_a_stage_that_is_too_busy_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.search.stages._WORTH_A_FORK", 0)
    monkeypatch.setattr("autopar.search.pool.num_processors", lambda: 1)
    stages = solver()
    none = Wanted(race_s=0.0)
    lost = [
        ToldStage(stage_of("mlp"), view, CONTEXT, math.inf, none, last=view is VIEWS[-1])
        for view in VIEWS
    ]
    other = ToldStage(stage_of("tied"), VIEWS[0], CONTEXT, math.inf, ANYTHING)
    asked = []
    solve = StageSolver.within
    monkeypatch.setattr(
        StageSolver, "within", lambda *told, **more: asked.append(told[1]) or solve(*told, **more)
    )
    stages.ahead([*lost, other])
    assert asked == [stage_of("mlp")] * 2


@pytest.mark.parametrize("narrow_s", [0.5, 3.0, None], ids=["faster", "slower", "none"])
def test_a_stage_keeps_the_faster_solution(
    narrow_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solved to a narrower gap a stage may end with a slower solution, or with none."""
    solve, asked = StageProgram.solved, list[float]()

    def solved(
        program: StageProgram, *, budget_bytes: float | None, options: SolverOptions
    ) -> StageSolution:
        free = solve(program, budget_bytes=None, options=options)
        if budget_bytes is None:
            return free
        asked.append(options.target_gap)
        seconds = 1.0 if options.target_gap == 0.1 else narrow_s
        if seconds is None:
            raise NoFeasiblePlan("too little")
        return replace(free, seconds=seconds, bound=seconds / 4)

    monkeypatch.setattr(StageProgram, "solved", solved)
    solver = StageSolver(
        SearchOptions(), lambda mesh: costs_of(mesh.axis_sizes), Clock(60.0, print), 1e-3
    )
    told = stage_of("mlp"), LogicalMesh((2,)), StageContext(), 1.0
    assert solver.within(*told, target_gap=0.1).seconds == 1.0
    found = solver.within(*told)
    assert found.seconds == min(1.0, narrow_s or 1.0)
    assert found.bound == min(found.seconds, max(0.25, (narrow_s or 0.0) / 4))
    assert solver.within(*told) is not None and solver.within(*told, target_gap=0.1) is not None
    assert asked == [0.1, 1e-3]
