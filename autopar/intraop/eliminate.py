"""Exact elimination of a whole pairwise program, node by node (bucket elimination, Dechter 1999).

Eliminating v replaces all tables that mention it by  T(N) = min_v sum of them  over its neighbours
N. The next node is always the one with the smallest joint table (min-fill by size); the sizes are
known beforehand, so a caller can refuse. Memory O(largest table), time O(sum of tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import prod

import numpy as np

from autopar.intraop.problem import FloatArray
from autopar.intraop.reduce import Graph

_MAX_DIMS = 64
"""Of a numpy array."""


@dataclass(frozen=True, slots=True)
class EliminationOrder:
    """order of the living nodes, and the entries of the largest joint table on the way."""

    order: tuple[int, ...]
    largest_table: int


@dataclass(frozen=True, slots=True)
class _Table:
    """values[x_a, x_b, ...] over scope (a < b < ...)."""

    scope: tuple[int, ...]
    values: FloatArray


def elimination_order(graph: Graph, limit: int) -> EliminationOrder | None:
    """Greedy order by smallest joint table, ties by index; None when a table would exceed limit
    entries or numpy's dims.

    O(N d^2 log N) for N living nodes of degree d.
    """
    near = {v: set(neighbours) for v, neighbours in graph.adj.items()}
    size = {v: len(c_v) for v, c_v in graph.unary.items()}
    joint = {v: size[v] * prod(map(size.__getitem__, near[v])) for v in near}
    heap = [(entries, v) for v, entries in joint.items()]
    heapify(heap)
    order: list[int] = []
    largest = 1
    while heap:
        entries, v = heappop(heap)
        if joint.get(v) != entries:
            continue  # an older size of v, or v is gone
        if entries > limit or len(near[v]) >= _MAX_DIMS:
            return None
        largest = max(largest, entries)
        order.append(v)
        neighbours = near.pop(v)
        del joint[v]
        for u in neighbours:
            near[u] |= neighbours
            near[u] -= {u, v}
            joint[u] = size[u] * prod(map(size.__getitem__, near[u]))
            heappush(heap, (joint[u], u))
    return EliminationOrder(tuple(order), largest)


def eliminate(graph: Graph, order: EliminationOrder) -> tuple[dict[int, int], float]:
    """(strategy of each living node, its cost without the graph's constant); inf where all is
    forbidden.
    """
    buckets: dict[int, list[_Table]] = {v: [_Table((v,), c_v)] for v, c_v in graph.unary.items()}
    for v, neighbours in graph.adj.items():
        for w, r_vw in neighbours.items():
            if v < w:
                buckets[v].append(_Table((v, w), r_vw))
                buckets[w].append(_Table((v, w), r_vw))
    value = 0.0
    steps: list[tuple[int, list[_Table]]] = []
    for v in order.order:
        tables = buckets.pop(v)
        steps.append((v, tables))
        scope = tuple(sorted({w for table in tables for w in table.scope}))
        reduced = _min_over(v, scope, tables, graph)
        rest = tuple(w for w in scope if w != v)
        for w in rest:
            buckets[w] = [t for t in buckets[w] if v not in t.scope]
            buckets[w].append(_Table(rest, reduced))
        if not rest:
            value += float(reduced)
    return _back_track(steps, graph), value


def _min_over(v: int, scope: tuple[int, ...], tables: list[_Table], graph: Graph) -> FloatArray:
    total = np.zeros([len(graph.unary[w]) for w in scope])
    for table in sorted(tables, key=lambda t: len(t.scope)):
        shape = [len(graph.unary[w]) if w in table.scope else 1 for w in scope]
        total += table.values.reshape(shape)
    return np.asarray(np.minimum.reduce(total, axis=scope.index(v)))


def _back_track(steps: list[tuple[int, list[_Table]]], graph: Graph) -> dict[int, int]:
    position: dict[int, int] = {}
    for v, tables in reversed(steps):
        cost = np.zeros(len(graph.unary[v]))
        for table in tables:
            at = tuple(slice(None) if w == v else position[w] for w in table.scope)
            cost = cost + table.values[at]
        position[v] = int(np.argmin(cost))
    return {v: int(graph.labels[v][s]) for v, s in position.items()}
