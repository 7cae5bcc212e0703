"""The one door of the intra-op solvers: a frozen problem in, a solution with its proven bound out.

DUAL is the default: numpy only, and HiGHS only where it leaves a gap above the target. The others
are whole MIP backends on the same problem, for checking and for users who want them. Same problem,
same answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from autopar.errors import NoFeasiblePlan, OptionError, SolverError
from autopar.intraop.branch import branch
from autopar.intraop.cbc import solve_cbc
from autopar.intraop.dual import CLOSED_GAP, MAX_SWEEPS
from autopar.intraop.fallback import solve_remainder
from autopar.intraop.free import Effort, Worth, minimise
from autopar.intraop.ilp import infeasible, solution
from autopar.intraop.mathopt import Engine, solve_mathopt
from autopar.intraop.memory import (
    STEP_CLOSE_ENOUGH,
    STEP_SWEEPS,
    STEP_TABLE_LIMIT,
    BudgetResult,
    Earlier,
    minimise_within_budget,
)
from autopar.intraop.problem import IntraOpProblem, IntraOpSolution, relative_gap


class NotWorth(NoFeasiblePlan):
    """Nothing within the budget is as fast as asked."""


class Solver(StrEnum):
    """DUAL: TRW-S and exact elimination. CBC: PuLP's. CP_SAT, HIGHS: OR-Tools MathOpt's."""

    DUAL = "dual"
    CBC = "cbc"
    CP_SAT = "cp_sat"
    HIGHS = "highs"


def solve(
    problem: IntraOpProblem,
    *,
    solver: Solver = Solver.DUAL,
    time_limit_s: float = 60.0,
    target_gap: float = 0.01,
    fallback: bool = True,
    branching: bool = False,
    earlier: Earlier | None = None,
    worth: Worth | None = None,
) -> IntraOpSolution:
    """The assignment of least seconds within the budget, and a proven lower bound.

    Stops at target_gap (relative; 0 = prove the optimum) or time_limit_s, whichever is first; a
    solution that is not proven optimal says so. Raises NoFeasiblePlan when nothing fits,
    SolverError when the time limit came before any assignment or a backend is missing.
    fallback=False: DUAL returns what it has above target_gap instead of branching and handing it to
    HiGHS; a search over many problems asks for that and comes back to the winner. branching: DUAL
    branches all the same. earlier: what DUAL found on the same program under other budgets, used
    and added to. worth: DUAL raises NotWorth as soon as it is proved that nothing is.
    """
    if not time_limit_s > 0:
        raise OptionError(f"time_limit_s must be > 0, got {time_limit_s}")
    if not 0 <= target_gap < 1:
        raise OptionError(f"target_gap must be in [0, 1), got {target_gap}")
    match solver:
        case Solver.DUAL:
            asked = _Asked(target_gap, fallback, branching or fallback, worth)
            return _solve_dual(problem, time_limit_s, asked, earlier or Earlier())
        case Solver.CBC:
            return solve_cbc(problem, time_limit_s=time_limit_s, target_gap=target_gap)
        case Solver.CP_SAT | Solver.HIGHS:
            engine = Engine(solver.value)
            return solve_mathopt(problem, engine, time_limit_s=time_limit_s, target_gap=target_gap)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `solve` is asked to do of the dual solver."""

    target_gap: float
    fallback: bool
    branching: bool
    worth: Worth | None


def _solve_dual(
    problem: IntraOpProblem, time_limit_s: float, asked: _Asked, earlier: Earlier
) -> IntraOpSolution:
    started = time.monotonic()
    deadline = started + time_limit_s
    if problem.budget_bytes is not None:
        return _solve_budgeted(problem, started, deadline, asked, earlier)
    effort = Effort(
        deadline=deadline,
        target_gap=asked.target_gap,
        allow_mip=asked.fallback,
        near=0.1 * asked.target_gap,
    )
    found = minimise(problem, problem.node_seconds, effort=effort, warm=earlier.warm)
    earlier.note(problem, 0.0, found)
    if found.choice is None:
        if found.bound == np.inf:
            raise infeasible(problem)
        raise SolverError(
            f"no assignment without forbidden pairs in {time_limit_s:.1f} s: raise it"
        )
    stats: dict[str, object] = {
        "sweeps": found.sweeps,
        "fixed": found.fixed,
        "largest_table": found.largest_table,
        "fallback": "highs" if found.used_mip else None,
    }
    if found.mip_error is not None:
        stats["fallback_error"] = found.mip_error
    return solution(problem, found.choice, found.bound, solver="dual", started=started, stats=stats)


def _solve_budgeted(
    problem: IntraOpProblem, started: float, deadline: float, asked: _Asked, earlier: Earlier
) -> IntraOpSolution:
    target_gap = asked.target_gap
    effort = Effort(
        deadline=deadline,
        target_gap=min(target_gap, 1e-3),
        allow_mip=False,
        table_limit=STEP_TABLE_LIMIT,
        near=0.1 * target_gap,
        max_sweeps=STEP_SWEEPS if target_gap else MAX_SWEEPS,
        close_enough=min(0.02 * target_gap, STEP_CLOSE_ENOUGH) if target_gap else CLOSED_GAP,
        worth=asked.worth,
    )
    known = minimise_within_budget(problem, effort=effort, earlier=earlier)
    if asked.worth is not None and earlier.in_vain(asked.worth):
        raise NotWorth(
            f"whatever fits {asked.worth.budget_bytes:.0f} bytes takes more than"
            f" {asked.worth.seconds:.3g} s"
        )
    gap = np.inf if known.best is None else relative_gap(known.best.seconds, known.bound)
    if gap > target_gap and asked.branching:
        halfway = (time.monotonic() + deadline) / 2
        known = branch(problem, known, earlier, replace(effort, deadline=halfway), target_gap)
    stats: dict[str, object] = {
        "sweeps": known.sweeps,
        "fixed": known.fixed,
        "largest_table": known.largest_table,
        "multipliers": known.multipliers,
        "fallback": None,
    }
    gap = np.inf if known.best is None else relative_gap(known.best.seconds, known.bound)
    mine = _own_solution(problem, known, started, stats)
    enough = gap <= target_gap or not asked.fallback or time.monotonic() > deadline
    if mine is not None and (enough or mine.optimal):
        return mine
    stats = {**stats, "fallback": "highs", "gap_before_fallback": gap}
    try:
        found = solve_remainder(problem, known, deadline=deadline, target_gap=target_gap)
    except SolverError as error:
        if mine is None:
            raise
        return replace(mine, stats={**stats, "fallback_error": str(error)})
    choice = found.choice
    if mine is not None and mine.seconds <= found.seconds:
        choice = mine.choice
    bound = max(known.bound, found.bound)
    return solution(problem, choice, bound, solver="dual", started=started, stats=stats)


def _own_solution(
    problem: IntraOpProblem, known: BudgetResult, started: float, stats: dict[str, object]
) -> IntraOpSolution | None:
    if known.best is None:
        return None
    return solution(
        problem, known.best.choice, known.bound, solver="dual", started=started, stats=stats
    )
