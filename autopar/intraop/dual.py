"""Dual block ascent on a pairwise program: passes of messages (`sweep`) until bound meets primal.

The assignments of a pass lag far behind the bound where it is all but tight. So the last few are
fused now and then: each node keeps the strategies that it has in them and its two best by belief,
and what is left is solved exactly (fusion moves: Lempitsky, Rother, Roth, Blake, PAMI 2010).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import fsum

import numpy as np

from autopar.intraop.compiled import tree_reweighted
from autopar.intraop.eliminate import eliminate, elimination_order
from autopar.intraop.problem import FloatArray, IntArray
from autopar.intraop.reduce import Graph
from autopar.intraop.sweep import TreeReweighted, WarmMessages

CLOSED_GAP = 1e-10
"""Relative gap below which bound and primal are the same number in float64 sums of 1e4 terms."""
MAX_SWEEPS = 400
_STALL_SWEEPS = 12
_FUSE_SWEEPS = 20
"""Every so many sweeps assignments are fused, which takes as long as a few hundred of them in C."""
_FUSE_KEPT = 5
"""Of so many last assignments, and the two best strategies by belief of each node."""
_FUSE_TABLES = (300_000, 10_000)
"""Entries of the largest table with and without the two best by belief."""
_WORTH_FIXING = 0.5
"""Share of the strategies: sweeps stop for a smaller graph where fixing drops so many."""
_STALL_SHARE = 0.02
_STALL_NEAR = 0.3
_STALL_GAIN = 1e-5
"""Stalled: twelve sweeps moved the bound by less than 2 % of the gap (30 % where it is near), and
by less than this share of itself: assignments stay far off until the bound is nearly tight
(empirical; llama, GPT, MoE and T5 graphs).
"""


@dataclass(frozen=True, slots=True)
class DualResult:
    """choice: strategy per living node (original labels). primal, bound: without the graph's
    constant.

    slack[v][s]: an assignment with x_v = s costs at least bound + slack[v][s]; s over living
    strategies. messages: the last ones.
    """

    choice: dict[int, int]
    primal: float
    bound: float
    sweeps: int
    slack: dict[int, FloatArray]
    messages: WarmMessages


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
    messages = tree_reweighted(graph, _forbidden_seconds(graph), warm)
    best, best_position, history = np.inf, np.zeros(len(messages.nodes), dtype=np.intp), [-np.inf]
    last: list[IntArray] = []
    for _ in range(max_sweeps):
        bound, position = messages.forward()
        history.append(max(bound, history[-1]))
        last = [*last[-_FUSE_KEPT + 1 :], position]
        value = messages.cost(position)
        if value < best:
            best, best_position = value, position
        if _finished(best, history, close_enough, near) or time.monotonic() > deadline:
            break
        if (len(history) - 1) % _FUSE_SWEEPS == 0:
            value, position = _fused(graph, messages, last)
            if value < best:
                best, best_position = value, position
            if _finished(best, history, close_enough, near) or _fixes(messages, history[-1], best):
                break
        messages.backward()
    last_messages = messages.by_edge()
    if warm is not None:
        warm |= last_messages
    choice = {
        v: int(graph.labels[v][s]) for v, s in zip(messages.nodes, best_position, strict=True)
    }
    slack = messages.by_node(messages.slack())
    return DualResult(choice, best, min(bound, best), len(history) - 1, slack, last_messages)


def _fused(graph: Graph, messages: TreeReweighted, last: list[IntArray]) -> tuple[float, IntArray]:
    """The best assignment made of these; inf where the tables would be too large."""
    seen = np.zeros(messages.first[-1], dtype=np.bool_)
    for position in last:
        seen[messages.first[:-1] + position] = True
    likely = seen.copy()
    masks = messages.by_node(likely)
    for v, belief in messages.by_node(messages.beliefs()).items():
        masks[v][np.argsort(belief, kind="stable")[:2]] = True
    for limit, mask in zip(_FUSE_TABLES, (likely, seen), strict=True):
        small = graph.copy()
        small.keep(messages.by_node(mask))
        small.reduce()
        order = elimination_order(small, limit)
        if order is not None:
            choice, value = eliminate(small, order)
            if not np.isfinite(value):
                break
            full = small.restore(choice)
            found = [graph.labels[v].searchsorted(full[v]) for v in messages.nodes]
            fused = np.array(found, dtype=np.intp)
            return messages.cost(fused), fused
    return np.inf, last[-1]


def _fixes(messages: TreeReweighted, bound: float, best: float) -> bool:
    """Whether fixing would drop most strategies now. Valid right after `forward`."""
    if not np.isfinite(best):
        return False
    slack = messages.slack()
    return bool(np.count_nonzero(bound + slack > best) > _WORTH_FIXING * len(slack))


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
    lower = fsum(float(c_v.min()) for c_v in graph.unary.values())
    ranges = fsum(float(np.ptp(c_v)) for c_v in graph.unary.values())
    spans: dict[int, tuple[float, float]] = {}
    forbidden = False
    for v, neighbours in graph.adj.items():
        for w, matrix in neighbours.items():
            if w < v:
                continue
            if id(matrix) not in spans:
                spans[id(matrix)] = _span(matrix)
                forbidden |= matrix.max() == np.inf
            low, high = spans[id(matrix)]
            lower, ranges = lower + low, ranges + high - low
    if not forbidden:
        return 0.0
    upper = _greedy_cost(graph)
    return 2.0 * (upper - lower if np.isfinite(upper) else ranges) + np.finfo(np.float64).tiny


def _span(matrix: FloatArray) -> tuple[float, float]:
    """Least and most of what is finite in it; 0 of nothing."""
    low, high = matrix.min(), matrix.max()
    if high == np.inf and low < np.inf:
        high = matrix.max(where=matrix < np.inf, initial=low)
    return (float(low), float(high)) if low < np.inf else (0.0, 0.0)


def _greedy_cost(graph: Graph) -> float:
    """Of the assignment that takes nodes in order, each at its least for what may follow."""
    position: dict[int, int] = {}
    total = 0.0
    for v in sorted(graph.unary):
        known = graph.unary[v]
        later = 0.0
        for w, matrix in graph.adj[v].items():
            if w < v:
                known = known + matrix[:, position[w]]
            else:
                later = later + np.minimum.reduce(matrix, axis=1)
        position[v] = int(np.argmin(known + later))
        total += float(known[position[v]])
    return total
