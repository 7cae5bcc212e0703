"""Dual block ascent on a pairwise program: sequential tree-reweighted messages (TRW-S, Kolmogorov,
PAMI 2006).

Nodes in index order; g_v = 1 / max(#earlier, #later neighbours); msg[v->w] in strategies of w:

    belief(v)  = c_v + sum_w msg[w->v]
    forward    for later w:    msg[v->w] = min over x_v of ( g_v belief(v) - msg[w->v] + R_vw )
    backward   the same, nodes in reverse, for earlier w
    bound      after a forward pass:  sum_v (1 - g_v #later(v)) min belief(v)
    primal     in the forward pass x_v = argmin c_v + sum_earlier R(x_w, .) + sum_later msg[w->v]
    slack      slack_v(s) = (1 - g_v #later)(belief_s - min belief)
                            + sum_later min_t [ g_v belief_s - msg[w->v]_s + R_st - msg[v->w]_t ]

The assignments of a pass lag far behind the bound where it is all but tight. So the last few are
fused now and then: each node keeps the strategies that it has in them and its two best by belief,
and what is left is solved exactly (fusion moves: Lempitsky, Rother, Roth, Blake, PAMI 2010).

Each edge term of the reparametrised objective has minimum 0, so `bound` holds for any messages,
and an assignment with x_v = s costs at least bound + slack_v(s). Messages are never normalised, or
the bound would be lost. Forbidden pairs enter as a large finite cost: a relaxation, so the bound
stays valid. A sweep costs the sum of the edge entries, twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.intraop.eliminate import eliminate, elimination_order
from autopar.intraop.problem import FloatArray, IntArray
from autopar.intraop.reduce import Graph

CLOSED_GAP = 1e-10
"""Relative gap below which bound and primal are the same number in float64 sums of 1e4 terms."""
WarmMessages = dict[tuple[int, int], FloatArray]
"""msg[v->w] by (v, w)."""
MAX_SWEEPS = 400
_STALL_SWEEPS = 6
_FUSE_SWEEPS = 10
"""Every so many sweeps assignments are fused."""
_FUSE_KEPT = 5
"""Of so many last assignments, and the two best strategies by belief of each node."""
_FUSE_TABLES = (300_000, 10_000)
"""Entries of the largest table with and without the two best by belief."""
_WORTH_FIXING = 0.5
"""Share of the strategies: sweeps stop for a smaller graph where fixing drops so many."""
_STALL_SHARE = 0.02
_STALL_NEAR = 0.3
_STALL_GAIN = 1e-5
"""Stalled: six sweeps moved the bound by less than 2 % of the gap (30 % where it is near enough),
and by less than this share of itself: assignments stay far off until the bound is nearly tight
(empirical; llama, GPT, MoE and T5 graphs).
"""


@dataclass(frozen=True, slots=True)
class DualResult:
    """choice: strategy per living node (original labels). primal, bound: without the graph's
    constant.

    slack[v][s]: an assignment with x_v = s costs at least bound + slack[v][s]; s over living
    strategies.
    """

    choice: dict[int, int]
    primal: float
    bound: float
    sweeps: int
    slack: dict[int, FloatArray]


@dataclass(frozen=True, slots=True)
class _Arc:
    """An edge seen from one end: matrix [n_here, n_there], finite; index of its messages in the
    sweep.
    """

    there: int
    message: int
    reply: int
    matrix: FloatArray


class TreeReweighted:
    """The messages of one graph (a builder, local to one solve).

    msg[i] for i = 2e goes from the earlier to the later end of edge e, for i = 2e + 1 back.
    """

    __slots__ = ("_earlier", "_graph", "_later", "_msg", "_nodes", "_share")

    def __init__(
        self, graph: Graph, forbidden_seconds: float, warm: WarmMessages | None = None
    ) -> None:
        self._graph = graph
        self._nodes = sorted(graph.unary)
        self._later: dict[int, list[_Arc]] = {v: [] for v in self._nodes}
        self._earlier: dict[int, list[_Arc]] = {v: [] for v in self._nodes}
        self._msg: list[FloatArray] = []
        old = warm or {}
        finite: dict[int, FloatArray] = {}
        for v in self._nodes:
            for w in sorted(w for w in graph.adj[v] if w > v):
                there, back = (graph.adj[v][w], graph.adj[w][v])
                for matrix in (there, back):
                    if id(matrix) not in finite:
                        finite[id(matrix)] = _without_inf(matrix, forbidden_seconds)
                i = len(self._msg)
                self._later[v].append(_Arc(w, i, i + 1, finite[id(there)]))
                self._earlier[w].append(_Arc(v, i + 1, i, finite[id(back)]))
                for a, b in ((v, w), (w, v)):
                    last, n = old.get((a, b)), len(graph.unary[b])
                    self._msg.append(last if last is not None and len(last) == n else np.zeros(n))
        self._share = {
            v: 1.0 / max(1, len(self._later[v]), len(self._earlier[v])) for v in self._nodes
        }

    def save(self, warm: WarmMessages) -> None:
        """Put the messages where a later solve can start from them."""
        for v in self._nodes:
            for arc in self._later[v]:
                warm[v, arc.there] = self._msg[arc.message]
                warm[arc.there, v] = self._msg[arc.reply]

    def _belief(self, v: int) -> FloatArray:
        belief = self._graph.unary[v].copy()
        for arc in self._earlier[v]:
            belief += self._msg[arc.reply]
        for arc in self._later[v]:
            belief += self._msg[arc.reply]
        return belief

    def forward(self) -> tuple[float, dict[int, int]]:
        """One forward pass: (bound, greedy position of each node)."""
        bound = 0.0
        position: dict[int, int] = {}
        for v in self._nodes:
            later, g_v = self._later[v], self._share[v]
            belief = self._belief(v)
            local = self._graph.unary[v].copy()
            for arc in self._earlier[v]:
                local += arc.matrix[:, position[arc.there]]
            for arc in later:
                local += self._msg[arc.reply]
            position[v] = int(local.argmin())
            bound += (1.0 - g_v * len(later)) * float(belief.min())
            self._send(later, belief * g_v)
        return bound, position

    def backward(self) -> None:
        """One backward pass."""
        for v in reversed(self._nodes):
            if self._earlier[v]:
                self._send(self._earlier[v], self._belief(v) * self._share[v])

    def _send(self, arcs: list[_Arc], shared: FloatArray) -> None:
        for arc in arcs:
            rows = arc.matrix + (shared - self._msg[arc.reply])[:, None]
            self._msg[arc.message] = np.minimum.reduce(rows, axis=0)

    def likely(self) -> dict[int, IntArray]:
        """Per node its two best strategies by belief."""
        return {v: np.argsort(self._belief(v), kind="stable")[:2] for v in self._nodes}

    def slack(self) -> dict[int, FloatArray]:
        """Per node and strategy; valid right after `forward`."""
        out: dict[int, FloatArray] = {}
        for v in self._nodes:
            later, g_v = self._later[v], self._share[v]
            belief = self._belief(v)
            slack_v = (1.0 - g_v * len(later)) * (belief - belief.min())
            for arc in later:
                back = self._graph.products.transpose(arc.matrix)  # [n_w, n_v]
                pair = np.minimum.reduce(back - self._msg[arc.message][:, None], axis=0)
                slack_v = slack_v + np.maximum(0.0, pair + g_v * belief - self._msg[arc.reply])
            out[v] = slack_v
        return out


def _without_inf(matrix: FloatArray, forbidden_seconds: float) -> FloatArray:
    if np.isfinite(matrix).all():
        return matrix
    return np.where(np.isfinite(matrix), matrix, forbidden_seconds)


def cost_of(graph: Graph, position: dict[int, int]) -> float:
    """True cost of positions of the living nodes, without the constant; inf where forbidden."""
    total = sum(float(graph.unary[v][s]) for v, s in position.items())
    for v, neighbours in graph.adj.items():
        row = position[v]
        total += sum(float(m[row, position[w]]) for w, m in neighbours.items() if w > v)
    return total


def ascend(
    graph: Graph,
    *,
    deadline: float,
    close_enough: float = CLOSED_GAP,
    near: float = 0.0,
    max_sweeps: int = MAX_SWEEPS,
    warm: WarmMessages | None = None,
) -> DualResult:
    """Sweep until the relative gap is close_enough, or the bound stalls, or time.monotonic() =
    deadline.

    near: relative gap from which on less patience is worth it. warm: messages of an earlier solve
    on a similar graph, used where sizes agree, and replaced by the last ones: any messages give a
    valid bound. Needs every living node to have a finite strategy and only finite ones
    (Graph.keep).
    """
    messages = TreeReweighted(graph, _forbidden_seconds(graph), warm)
    best, best_position, history = np.inf, dict.fromkeys(graph.unary, 0), [-np.inf]
    last: list[dict[int, int]] = []
    for _ in range(max_sweeps):
        bound, position = messages.forward()
        history.append(max(bound, history[-1]))
        last = [*last[-_FUSE_KEPT + 1 :], position]
        value = cost_of(graph, position)
        if value < best:
            best, best_position = value, position
        if _finished(best, history, close_enough, near) or time.monotonic() > deadline:
            break
        if (len(history) - 1) % _FUSE_SWEEPS == 0:
            value, position = _fused(graph, last, messages.likely())
            if value < best:
                best, best_position = value, position
            if _finished(best, history, close_enough, near) or _fixes(messages, history[-1], best):
                break
        messages.backward()
    if warm is not None:
        messages.save(warm)
    choice = {v: int(graph.labels[v][s]) for v, s in best_position.items()}
    return DualResult(choice, best, min(bound, best), len(history) - 1, messages.slack())


def _fused(
    graph: Graph, last: list[dict[int, int]], likely: dict[int, IntArray]
) -> tuple[float, dict[int, int]]:
    """The best assignment made of these; (inf, {}) where the tables would be too large."""
    for limit, more in zip(_FUSE_TABLES, (likely, None), strict=True):
        masks = {v: np.zeros(len(c_v), dtype=np.bool_) for v, c_v in graph.unary.items()}
        for v, mask in masks.items():
            mask[[position[v] for position in last]] = True
            if more is not None:
                mask[more[v]] = True
        small = graph.copy()
        small.keep(masks)
        small.reduce()
        order = elimination_order(small, limit)
        if order is not None:
            choice, value = eliminate(small, order)
            if not np.isfinite(value):
                break
            full = small.restore(choice)
            found = {v: int(np.searchsorted(graph.labels[v], full[v])) for v in graph.unary}
            return cost_of(graph, found), found
    return np.inf, {}


def _fixes(messages: TreeReweighted, bound: float, best: float) -> bool:
    """Whether fixing would drop most strategies now. Valid right after `forward`."""
    if not np.isfinite(best):
        return False
    slack = messages.slack()
    dropped = sum(int(np.count_nonzero(bound + s_v > best)) for s_v in slack.values())
    return dropped > _WORTH_FIXING * sum(len(s_v) for s_v in slack.values())


def _finished(best: float, history: list[float], close_enough: float, near: float) -> bool:
    bound = history[-1]
    if best - bound <= close_enough * abs(best):
        return True
    if len(history) <= _STALL_SWEEPS + 1:
        return False
    gain = bound - history[-1 - _STALL_SWEEPS]
    gap = best - bound if np.isfinite(best) else abs(bound)
    if gap <= near * abs(best):
        return gain < _STALL_NEAR * gap
    return gain < min(_STALL_SHARE * gap, _STALL_GAIN * abs(bound))


def _forbidden_seconds(graph: Graph) -> float:
    """A finite cost that no optimum pays: twice (a greedy assignment - sum of all minima).

    Whatever uses one such pair costs more than the greedy assignment. Without a finite greedy one:
    the sum of all ranges. Small on purpose: the larger it is, the slower messages settle.
    """
    lower = sum(float(c_v.min()) for c_v in graph.unary.values())
    ranges = sum(float(np.ptp(c_v)) for c_v in graph.unary.values())
    spans: dict[int, tuple[float, float]] = {}
    forbidden = False
    for v, neighbours in graph.adj.items():
        for w, matrix in neighbours.items():
            if w < v:
                continue
            if id(matrix) not in spans:
                finite = matrix[np.isfinite(matrix)]
                forbidden |= finite.size < matrix.size
                spans[id(matrix)] = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
            low, high = spans[id(matrix)]
            lower, ranges = lower + low, ranges + high - low
    if not forbidden:
        return 0.0
    upper = cost_of(graph, _greedy(graph))
    return 2.0 * (upper - lower if np.isfinite(upper) else ranges) + np.finfo(np.float64).tiny


def _greedy(graph: Graph) -> dict[int, int]:
    position: dict[int, int] = {}
    for v in sorted(graph.unary):
        local: NDArray[np.float64] = graph.unary[v]
        for w, matrix in graph.adj[v].items():
            local = local + (matrix[:, position[w]] if w < v else np.minimum.reduce(matrix, axis=1))
        position[v] = int(np.argmin(local))
    return position
