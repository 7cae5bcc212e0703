"""Hand a budgeted program to HiGHS after fixing what the best multiplier already decides.

For the l with the best L(l): an assignment within the budget with x_v = s costs at least
dual bound + slack_v(s) - l M, so every s for which that exceeds the incumbent is left out. Valid
on the whole program only (no reduction before it), since vanished nodes carry bytes.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.intraop.dual import ascend
from autopar.intraop.ilp import OPTIMAL_GAP
from autopar.intraop.mathopt import Engine, solve_mathopt
from autopar.intraop.memory import BudgetResult
from autopar.intraop.problem import IntArray, IntraOpProblem, IntraOpSolution
from autopar.intraop.reduce import Graph, Products


def solve_remainder(
    problem: IntraOpProblem,
    known: BudgetResult,
    *,
    deadline: float,
    target_gap: float,
) -> IntraOpSolution:
    """HiGHS from the incumbent. Raises SolverError when it finds nothing, NoFeasiblePlan when
    there is nothing.

    Its bound holds for the program: what was left out is no better than the incumbent.
    """
    products = Products()
    kept = _undecided(problem, known, deadline)
    start = None
    if known.best is not None:
        pairs = zip(kept, known.best.choice, strict=True)
        start = tuple(int(np.searchsorted(labels, s)) for labels, s in pairs)
    small = replace(
        problem,
        node_seconds=tuple(c_v[s] for c_v, s in zip(problem.node_seconds, kept, strict=True)),
        node_bytes=tuple(m_v[s] for m_v, s in zip(problem.node_bytes, kept, strict=True)),
        edge_seconds=tuple(
            products.take(r_uv, kept[u], kept[v])
            for (u, v), r_uv in zip(problem.edges, problem.edge_seconds, strict=True)
        ),
    )
    left_s = max(0.1, deadline - time.monotonic())
    try:
        found = solve_mathopt(
            small, Engine.HIGHS, time_limit_s=left_s, target_gap=target_gap, start=start
        )
    except NoFeasiblePlan:
        if known.best is None:
            raise
        return _incumbent(problem, known)
    choice = tuple(int(labels[s]) for labels, s in zip(kept, found.choice, strict=True))
    return replace(found, choice=choice)


def _incumbent(problem: IntraOpProblem, known: BudgetResult) -> IntraOpSolution:
    """HiGHS, with its tolerances, saw nothing as good as the incumbent: then that is the
    optimum.
    """
    assert known.best is not None
    best = known.best
    bound = best.seconds * (1.0 - OPTIMAL_GAP)
    return IntraOpSolution(best.choice, best.seconds, best.bytes, bound, True, "highs", 0.0)


def _undecided(problem: IntraOpProblem, known: BudgetResult, deadline: float) -> list[IntArray]:
    """Per node the strategies that may be in a better assignment; the incumbent's always."""
    allowed = [np.isfinite(c_v) for c_v in problem.node_seconds]
    if known.best is not None and problem.budget_bytes is not None:
        multiplier = known.multiplier
        pairs = zip(problem.node_seconds, problem.node_bytes, strict=True)
        graph = Graph(problem, [c_v + multiplier * m_v for c_v, m_v in pairs])
        halfway = time.monotonic() + 0.25 * max(0.0, deadline - time.monotonic())
        dual = ascend(graph, deadline=halfway)
        limit = known.best.seconds + multiplier * problem.budget_bytes
        limit += 1e-9 * abs(limit)
        for v, s_v in dual.slack.items():
            mask = np.zeros(len(allowed[v]), dtype=np.bool_)
            mask[graph.labels[v]] = dual.bound + s_v <= limit
            mask[known.best.choice[v]] = True
            allowed[v] = mask
    return [np.flatnonzero(mask) for mask in allowed]
