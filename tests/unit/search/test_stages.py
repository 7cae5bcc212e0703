"""Stages solved whole: what is remembered of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.errors import NoFeasiblePlan
from autopar.intraop.stage import SolverOptions, StageProgram, StageSolution
from autopar.intraop.stage_problem import StageContext
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions
from autopar.search.clock import Clock
from autopar.search.stages import StageSolver
from tests.unit.intraop.stages import costs_of, stage_of


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
