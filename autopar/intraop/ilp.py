"""The intra-op program as a mixed-integer linear one, shared by all MIP backends.

    min   sum_v c_v . x_v + sum_(u,v) <R_uv, e_uv>           x binary, e >= 0 (integral where x is)
    one_hot       sum_s x_v[s] = 1                            for every node
    edge_product  sum_t e_uv[s,t] - x_u[s] = 0                for every edge and s
                  sum_s e_uv[s,t] - x_v[t] = 0                for every edge and t
    memory        sum_v m_v . x_v <= budget                   if there is one

(Alpa, OSDI'22, section 4.2.) Forbidden strategies and pairs have no column. Objective and memory
row are scaled: solvers' tolerances are absolute (1e-6), plans last milliseconds and hold gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

import numpy as np

from autopar.errors import NoFeasiblePlan, SolverError
from autopar.intraop.problem import (
    FloatArray,
    IntArray,
    IntraOpProblem,
    IntraOpSolution,
    least_bytes,
    relative_gap,
)

_OBJECTIVE_SIZE = 1e4
_MEMORY_SIZE = 1e3
"""The size that objective and memory row get: 1e-6 absolute is then 1e-10 and 1e-9 of it."""
_ROUNDING = 1e-14
"""Relative: a solver adds the seconds of its solution in another order than the problem does."""
OPTIMAL_GAP = 1e-6
"""Relative gap under which a solution is called optimal."""
MAX_COLUMNS = 3_000_000
"""Columns that a MIP solver is given at most: beyond, they run out of memory before the time
limit.
"""


@dataclass(frozen=True, slots=True)
class LinearProgram:
    """Rows lower <= A y <= upper over columns y in [0, 1], A as (row, column, value) triples
    sorted by row.

    objective is scaled: seconds = objective_unit_s * (objective . y). The first num_binary columns
    are the x, first_column[v] + i being the i-th entry of allowed[v].
    """

    objective: FloatArray
    num_binary: int
    row: IntArray
    column: IntArray
    value: FloatArray
    lower: FloatArray
    upper: FloatArray
    allowed: tuple[IntArray, ...]
    first_column: IntArray
    objective_unit_s: float

    def choice(self, y: FloatArray) -> tuple[int, ...]:
        """The strategies of a solution vector: per node the largest x."""
        pairs = zip(self.first_column, self.allowed, strict=True)
        return tuple(int(s[int(np.argmax(y[first : first + len(s)]))]) for first, s in pairs)

    def vector(self, choice: tuple[int, ...]) -> FloatArray:
        """x of an assignment, e left out (0): a start for solvers that complete a partial one."""
        y = np.zeros(self.num_binary)
        for first, strategies, s in zip(self.first_column, self.allowed, choice, strict=True):
            y[first + int(np.searchsorted(strategies, s))] = 1.0
        return y


class _Rows:
    """Rows being collected (a builder)."""

    def __init__(self) -> None:
        self.row: list[IntArray] = []
        self.column: list[IntArray] = []
        self.value: list[FloatArray] = []
        self.lower: list[FloatArray] = []
        self.upper: list[FloatArray] = []
        self.count = 0

    def add(
        self,
        row: IntArray,
        column: IntArray,
        value: FloatArray,
        lower: FloatArray,
        upper: FloatArray,
    ) -> None:
        """row counts from the first of these rows."""
        self.row.append(row + self.count)
        self.column.append(column)
        self.value.append(value)
        self.lower.append(lower)
        self.upper.append(upper)
        self.count += len(lower)


def linearise(problem: IntraOpProblem, *, scale_memory: bool = True) -> LinearProgram:
    """The arrays of the module docstring. O(edge entries).

    scale_memory=False keeps whole bytes, for a solver that is exact on integers only.
    """
    allowed = tuple(np.flatnonzero(np.isfinite(c_v)) for c_v in problem.node_seconds)
    first = np.concatenate([[0], np.cumsum([len(s) for s in allowed])]).astype(np.intp)
    rows = _Rows()
    num_binary = int(first[-1])
    node = np.repeat(np.arange(len(allowed), dtype=np.intp), np.diff(first))
    one = np.ones(len(allowed))
    rows.add(node, np.arange(num_binary, dtype=np.intp), np.ones(num_binary), one, one)
    costs = [c_v[s] for c_v, s in zip(problem.node_seconds, allowed, strict=True)]
    costs += _add_edge_products(problem, allowed, first, rows)
    _add_memory(problem, allowed, rows, scale_memory)
    objective = np.concatenate(costs) if costs else np.zeros(0)
    unit = _objective_unit(problem)
    row = np.concatenate(rows.row)
    order = np.argsort(row, kind="stable")
    return LinearProgram(
        objective=objective / unit,
        num_binary=num_binary,
        row=row[order],
        column=np.concatenate(rows.column)[order],
        value=np.concatenate(rows.value)[order],
        lower=np.concatenate(rows.lower),
        upper=np.concatenate(rows.upper),
        allowed=allowed,
        first_column=first[:-1],
        objective_unit_s=unit,
    )


def _add_edge_products(
    problem: IntraOpProblem, allowed: tuple[IntArray, ...], first: IntArray, rows: _Rows
) -> list[FloatArray]:
    costs: list[FloatArray] = []
    base = int(first[-1])
    for (u, v), r_uv in zip(problem.edges, problem.edge_seconds, strict=True):
        inner = r_uv[np.ix_(allowed[u], allowed[v])]
        s, t = np.nonzero(np.isfinite(inner))
        e = base + np.arange(len(s), dtype=np.intp)
        for end, index in ((u, s), (v, t)):
            n = len(allowed[end])
            x = first[end] + np.arange(n, dtype=np.intp)
            value = np.concatenate([np.ones(len(e)), -np.ones(n)])
            row = np.concatenate([index, np.arange(n, dtype=np.intp)])
            rows.add(row, np.concatenate([e, x]), value, np.zeros(n), np.zeros(n))
        costs.append(inner[s, t])
        base += len(e)
        if base > MAX_COLUMNS:
            raise SolverError(
                f"the linear program has more than {MAX_COLUMNS} columns: use the dual solver, "
                "merge operators, or offer fewer strategies"
            )
    return costs


def _add_memory(
    problem: IntraOpProblem, allowed: tuple[IntArray, ...], rows: _Rows, scaled: bool
) -> None:
    if problem.budget_bytes is None:
        return
    m = np.concatenate([m_v[s] for m_v, s in zip(problem.node_bytes, allowed, strict=True)])
    size = problem.budget_bytes or max(float(m.max()), 1.0)
    scale = _MEMORY_SIZE / size if scaled else 1.0
    (used,) = np.nonzero(m)
    upper = np.array([problem.budget_bytes * scale])
    rows.add(np.zeros(len(used), np.intp), used, m[used] * scale, np.array([-np.inf]), upper)


def _objective_unit(problem: IntraOpProblem) -> float:
    """Seconds per unit of the scaled objective: the sum of all minima becomes about
    _OBJECTIVE_SIZE.
    """
    least = fsum(abs(float(c_v.min())) for c_v in problem.node_seconds)
    peak = max((float(c_v[np.isfinite(c_v)].max()) for c_v in problem.node_seconds), default=0.0)
    low: dict[int, float] = {}
    for r_uv in problem.edge_seconds:
        if id(r_uv) not in low:
            finite = r_uv[np.isfinite(r_uv)]
            low[id(r_uv)] = abs(float(finite.min())) if finite.size else 0.0
            peak = max(peak, float(finite.max()) if finite.size else 0.0)
        least += low[id(r_uv)]
    return (max(least, 1e-3 * peak) or 1.0) / _OBJECTIVE_SIZE


def solution(
    problem: IntraOpProblem,
    choice: tuple[int, ...],
    bound: float,
    *,
    solver: str,
    started: float,
    stats: Mapping[str, object],
) -> IntraOpSolution:
    """Checks an assignment against the problem and states its gap. started: time.monotonic()."""
    seconds, num_bytes = problem.seconds(choice), problem.bytes(choice)
    if not np.isfinite(seconds) or not problem.fits(num_bytes):
        raise SolverError(
            f"{solver} returned an assignment of {seconds} s and {num_bytes:.0f} bytes, which "
            f"breaks a constraint (budget {problem.budget_bytes}): numerical trouble, "
            "use another solver"
        )
    if bound >= seconds - _ROUNDING * abs(seconds):
        bound = seconds
    return IntraOpSolution(
        choice=choice,
        seconds=seconds,
        bytes=num_bytes,
        bound=bound,
        optimal=relative_gap(seconds, bound) <= OPTIMAL_GAP,
        solver=solver,
        wall_s=time.monotonic() - started,
        stats=stats,
    )


def infeasible(
    problem: IntraOpProblem, *, least: float | None = None, exact: bool = False
) -> NoFeasiblePlan:
    """The error for a problem proven infeasible: what binds and the smallest budget that fits."""
    if problem.budget_bytes is None:
        return NoFeasiblePlan(
            "no assignment avoids all forbidden strategies and pairs: offer more strategies, for "
            "example the fully replicated one for every operator"
        )
    if least is None:
        found = least_bytes(problem)
        least, exact = found.bytes, found.exact
    m_min = [
        float(m_v[np.isfinite(c_v)].min())
        for c_v, m_v in zip(problem.node_seconds, problem.node_bytes, strict=True)
    ]
    top = sorted(range(len(m_min)), key=lambda v: (-m_min[v], v))[:5]
    heaviest = ", ".join(f"{problem.node_names[v]} {_gib(m_min[v])}" for v in top)
    smallest = "the smallest budget that fits is" if exact else "any budget that fits is above"
    return NoFeasiblePlan(
        f"no plan fits the budget of {_gib(problem.budget_bytes)} "
        f"({problem.budget_bytes:.0f} bytes): {smallest} {_gib(least)} ({least:.0f} bytes). "
        f"The largest least bytes are at: {heaviest}. "
        "Raise the budget, use more devices or microbatches, or allow rematerialisation.",
        least_bytes=least,
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
