"""The program without a budget: reduce, ascend, fix, reduce, eliminate; a MIP only for what is
left.

After the dual, a strategy s of v with  bound + slack_v(s) > primal  is in no better assignment and
is dropped (reduced-cost fixing). Few survive, so exact elimination usually ends it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autopar.errors import SolverError
from autopar.intraop.dual import CLOSED_GAP, MAX_SWEEPS, DualResult, ascend
from autopar.intraop.eliminate import eliminate, elimination_order
from autopar.intraop.mathopt import Engine, solve_mathopt
from autopar.intraop.problem import FloatArray, IntArray, IntraOpProblem
from autopar.intraop.reduce import Graph
from autopar.intraop.sweep import WarmMessages

TABLE_LIMIT = 30_000_000
"""Entries of the largest table that elimination may build: 240 MB of float64."""
_EASY_TABLE = 200_000
"""A table this small is eliminated at once: cheaper than one sweep over a graph of that width."""
_ROUNDS = 4


class Worth(NamedTuple):
    """Assignments within so many bytes that take more seconds are of no use."""

    seconds: float
    budget_bytes: float


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try: until target_gap (relative) or time.monotonic() = deadline.

    close_enough: relative gap at which the sweeps stop; above it, fixing and elimination go on.
    near: relative gap from which on sweeps stop sooner when they gain little.
    max_sweeps: of each round. table_limit: entries of the largest table that exact elimination may
    build. allow_mip: HiGHS may finish. worth: ends where it is proved that nothing is.
    """

    deadline: float
    target_gap: float
    allow_mip: bool
    table_limit: int = TABLE_LIMIT
    close_enough: float = CLOSED_GAP
    near: float = 0.0
    max_sweeps: int = MAX_SWEEPS
    worth: Worth | None = None


@dataclass(frozen=True, slots=True)
class FreeResult:
    """An assignment of all nodes and the proven bound on the objective c (which may be a_v + l
    m_v).
    """

    choice: tuple[int, ...] | None
    value: float
    bound: float
    sweeps: int
    fixed: int
    largest_table: int
    used_mip: bool
    mip_error: str | None = None  # why HiGHS was asked and gave nothing


class _Best:
    """The incumbent and the bound of one solve, the graph's constant included."""

    __slots__ = ("bound", "choice", "fixed", "largest", "mip_error", "sweeps", "used_mip", "value")

    def __init__(self) -> None:
        self.choice: tuple[int, ...] | None = None
        self.value, self.bound = np.inf, -np.inf
        self.sweeps = self.fixed = self.largest = 0
        self.used_mip = False
        self.mip_error: str | None = None

    def offer(self, graph: Graph, choice: dict[int, int], value: float) -> None:
        if value < self.value:
            self.value, self.choice = value, graph.restore(choice)

    def gap(self) -> float:
        """Relative to the value; inf before there is one."""
        if self.value == np.inf:
            return np.inf
        return (self.value - self.bound) / max(abs(self.value), np.finfo(np.float64).tiny)

    def result(self) -> FreeResult:
        bound = min(self.bound, self.value)
        return FreeResult(
            self.choice,
            self.value,
            bound,
            self.sweeps,
            self.fixed,
            self.largest,
            self.used_mip,
            self.mip_error,
        )


class Priced:
    """A program at many prices of a byte: nodes without bytes are reduced once for all of them."""

    def __init__(self, problem: IntraOpProblem) -> None:
        self._bytes = {v: m_v for v, m_v in enumerate(problem.node_bytes) if m_v.any()}
        self._graph = Graph(problem, problem.node_seconds)
        self._graph.reduce(self._bytes)

    def minimise(
        self, rate: float, *, effort: Effort, warm: WarmMessages | None = None
    ) -> FreeResult:
        """As `minimise` of c_v + rate m_v."""
        graph = self._graph.priced({v: rate * m_v for v, m_v in self._bytes.items()})
        return _minimise(graph, effort, warm)


def minimise(
    problem: IntraOpProblem,
    unary: Sequence[FloatArray],
    *,
    effort: Effort,
    warm: WarmMessages | None = None,
) -> FreeResult:
    """min sum_v unary_v . x_v + sum x_u' R_uv x_v over one-hot x, the budget ignored.

    choice is None and value inf when every assignment is forbidden. warm may be kept
    between calls.
    """
    return _minimise(Graph(problem, unary), effort, warm)


def _minimise(graph: Graph, effort: Effort, warm: WarmMessages | None) -> FreeResult:
    best = _Best()
    for _ in range(_ROUNDS):
        graph.reduce()
        if not graph.keep_allowed() or graph.constant == np.inf:
            best.bound = best.value  # nothing better than the incumbent is left
            return best.result()
        if _eliminated(graph, best, _EASY_TABLE):
            return best.result()
        dual = ascend(
            graph,
            deadline=effort.deadline,
            close_enough=effort.close_enough,
            near=effort.near,
            max_sweeps=effort.max_sweeps,
            warm=warm,
        )
        best.sweeps += dual.sweeps
        best.offer(graph, dual.choice, dual.primal + graph.constant)
        best.bound = max(best.bound, dual.bound + graph.constant)
        if best.gap() <= effort.close_enough:
            return best.result()
        before = dict(graph.labels)
        fixed = _fix(graph, dual, best.value - graph.constant)
        best.fixed += fixed
        warm = _kept(dual.messages, before, graph)
        if fixed == 0 or time.monotonic() > effort.deadline:
            break
    graph.reduce()
    enough = best.value - best.bound <= effort.target_gap * abs(best.bound)
    if not _eliminated(graph, best, _EASY_TABLE if enough else effort.table_limit) and not enough:
        _remainder(graph, best, effort)
    return best.result()


def _fix(graph: Graph, dual: DualResult, primal: float) -> int:
    if not np.isfinite(primal):
        return 0
    margin = 1e-12 * max(abs(primal), abs(dual.bound))
    return graph.keep({v: dual.bound + s_v <= primal + margin for v, s_v in dual.slack.items()})


def _kept(messages: WarmMessages, before: Mapping[int, IntArray], graph: Graph) -> WarmMessages:
    """Those to the strategies that are left. before: labels that they were made for."""
    index = {
        v: before[v].searchsorted(labels)
        for v, labels in graph.labels.items()
        if len(labels) < len(before[v])
    }
    return {(v, w): m[index[w]] if w in index else m for (v, w), m in messages.items()}


def _eliminated(graph: Graph, best: _Best, limit: int) -> bool:
    order = elimination_order(graph, limit)
    if order is None:
        return False
    best.largest = max(best.largest, order.largest_table)
    choice, value = eliminate(graph, order)
    if np.isfinite(value):
        best.offer(graph, choice, value + graph.constant)
    best.bound = best.value  # what was dropped before is no better than the incumbent
    return True


def _remainder(graph: Graph, best: _Best, effort: Effort) -> None:
    """HiGHS on the living nodes, from the incumbent, for the rest of the time."""
    seconds_left = effort.deadline - time.monotonic()
    if not effort.allow_mip or seconds_left <= 0:
        return
    nodes = sorted(graph.unary)
    index = {v: i for i, v in enumerate(nodes)}
    pairs = [(v, w) for v in nodes for w in sorted(graph.adj[v]) if v < w]
    rest = IntraOpProblem(
        node_names=tuple(f"n{v}" for v in nodes),
        node_seconds=tuple(graph.unary[v] for v in nodes),
        node_bytes=tuple(np.zeros(len(graph.unary[v])) for v in nodes),
        edges=tuple((index[v], index[w]) for v, w in pairs),
        edge_seconds=tuple(graph.adj[v][w] for v, w in pairs),
    )
    start = _start(graph, nodes, best)
    try:
        found = solve_mathopt(
            rest, Engine.HIGHS, time_limit_s=seconds_left, target_gap=effort.target_gap, start=start
        )
    except SolverError as error:  # no better than the incumbent within the time
        best.mip_error = str(error)
        return
    best.used_mip = True
    chosen = {v: int(graph.labels[v][s]) for v, s in zip(nodes, found.choice, strict=True)}
    best.offer(graph, chosen, found.seconds + graph.constant)
    best.bound = max(best.bound, min(best.value, found.bound + graph.constant))


def _start(graph: Graph, nodes: list[int], best: _Best) -> tuple[int, ...] | None:
    if best.choice is None:
        return None
    start = tuple(int(np.searchsorted(graph.labels[v], best.choice[v])) for v in nodes)
    alive = all(s < len(graph.unary[v]) for v, s in zip(nodes, start, strict=True))
    return start if alive else None
