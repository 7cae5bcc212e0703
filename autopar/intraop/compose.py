"""Layers to stages: a frontier of (seconds, bytes) per layer class, and stage tables made of it.

Each distinct layer is solved alone on each mesh view, at several prices of a byte; its boundary
values may come and go in any layout, and where a layer reads and makes values of one shape their
layouts are priced as if the same layer followed. A stage of layers i..j with f microbatches in
flight then takes, at one price l per byte, the best point of each layer:

    p_k(l, f) = argmin over points p of layer k:  seconds(p) + l (standing(p) + f saved(p))
    t[f, i, j] = sum_k seconds(p_k(l, f))   at the smallest l with  sum_k bytes + max_k transient <=
    M

These tables steer the inter-op search; the stages that it picks are solved again whole and exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.estimate import MeshCosts
from autopar.graph.program import Graph, Ref
from autopar.intraop.build import (
    Node,
    ParameterChoice,
    StageContext,
    StageProblem,
    build_problem,
)
from autopar.intraop.memory_use import transient_bytes
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.solver import solve
from autopar.layout import Layout
from autopar.sharding.registry import RuleTable
from autopar.sharding.strategy import Strategy

FloatArray = NDArray[np.float64]

# Prices of a byte, as multiples of (free optimum's seconds / its bytes): from "free" to "least
# bytes".
_PRICES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True)
class Point:
    """One solution of one layer on one mesh view. Seconds per microbatch, bytes per device."""

    seconds: float
    standing_bytes: float
    saved_bytes: float
    transient_bytes: float


def layer_points(
    graph: Graph,
    table: RuleTable,
    costs: MeshCosts,
    context: StageContext,
    *,
    prices: Sequence[float] = _PRICES,
    time_limit_s: float = 60.0,
) -> tuple[Point, ...]:
    """The layer's solutions at each price, duplicates removed, the fastest first."""
    built = build_problem(graph, table, costs, context)
    problem = _with_cycle(built, costs)
    points: dict[Point, None] = {}
    free_rate = 0.0
    for price in prices:
        rate = price * free_rate
        priced = replace(
            problem,
            node_seconds=tuple(
                c + rate * m for c, m in zip(problem.node_seconds, problem.node_bytes, strict=True)
            ),
        )
        choice = solve(priced, time_limit_s=time_limit_s, fallback=False).choice
        point = _point(graph, built, choice, costs, context)
        if price == 0.0:
            total = point.standing_bytes + point.saved_bytes
            free_rate = point.seconds / total if total else 0.0
        points[point] = None
    return tuple(points)


def _with_cycle(built: StageProblem, costs: MeshCosts) -> IntraOpProblem:
    """Prices the step from the layer's outputs to the next equal layer's inputs."""
    received = {
        n.name: i
        for i, n in enumerate(built.nodes)
        if n.kind == "input" and n.name in built.received
    }
    edges = dict(zip(built.problem.edges, built.problem.edge_seconds, strict=True))
    taken: set[int] = set()
    for number, node in enumerate(built.nodes):
        if node.kind != "output" or node.name not in built.sent:
            continue
        meta, phase = built.sent[node.name]
        for name, source in received.items():
            if source in taken or built.received[name] != (meta, phase):
                continue
            columns = _boundary_layouts(built.nodes[source])
            targets = _boundary_layouts(node)
            if columns != targets:
                continue
            dims = built.dims[Ref(name)]
            matrix = costs.reshard_seconds(dims, targets, columns, meta.nbytes).T.copy()
            old = edges.get((source, number))
            edges[source, number] = matrix if old is None else old + matrix
            taken.add(source)
            break
    return replace(built.problem, edges=tuple(edges), edge_seconds=tuple(edges.values()))


def _boundary_layouts(node: Node) -> tuple[Layout, ...]:
    """The layouts that a received or sent value can have."""
    return tuple(c for c in node.choices if not isinstance(c, Strategy | ParameterChoice))


def _point(
    graph: Graph,
    built: StageProblem,
    choice: tuple[int, ...],
    costs: MeshCosts,
    context: StageContext,
) -> Point:
    nbytes = built.kind_bytes(choice)
    chosen = built.read(choice)
    return Point(
        seconds=built.problem.seconds(choice) - _receive_seconds(built, choice),
        standing_bytes=nbytes["parameter"] + nbytes["gradient"],
        saved_bytes=nbytes["saved"] / context.in_flight,
        transient_bytes=transient_bytes(
            graph,
            built.dims,
            chosen.strategies,
            chosen.inputs,
            costs.mesh.axis_sizes,
            outputs=chosen.outputs,
            num_microbatches=context.num_microbatches,
        ),
    )


def _receive_seconds(built: StageProblem, choice: tuple[int, ...]) -> float:
    """What the layer alone pays for values that in a stage its neighbour has."""
    return sum(
        float(built.problem.node_seconds[i][choice[i]])
        for i, node in enumerate(built.nodes)
        if node.kind == "input" and node.name in built.received
    )


def stage_table(
    points: Sequence[Sequence[Point]], in_flight: Sequence[int], budget_bytes: float
) -> FloatArray:
    """[F, K, K]: seconds of layers i..j with in_flight[f] microbatches, inf where nothing fits.

    points: of each layer. O(F x prices x (K points + K^2)).
    """
    num_layers = len(points)
    table = np.full((len(in_flight), num_layers, num_layers), np.inf)
    upper = np.triu(np.ones((num_layers, num_layers), dtype=bool))
    for row, flight in enumerate(in_flight):
        for rate in _rates(points):
            seconds, standing, transient = _best_points(points, flight, rate)
            total_s = _range_sums(seconds)
            need = _range_sums(standing) + _range_maxima(transient)
            fits = upper & (need <= budget_bytes) & (total_s < table[row])
            table[row][fits] = total_s[fits]
    return table


def _rates(points: Sequence[Sequence[Point]]) -> list[float]:
    """Prices that separate the points: every slope between neighbouring points of a layer."""
    rates = {0.0}
    for frontier in {tuple(p) for p in points}:
        ordered = sorted(frontier, key=lambda p: p.seconds)
        for fast, small in itertools.pairwise(ordered):
            saved = (fast.standing_bytes + fast.saved_bytes) - (
                small.standing_bytes + small.saved_bytes
            )
            if saved > 0:
                slope = (small.seconds - fast.seconds) / saved
                rates.update((slope * 0.999, slope * 1.001))
    rates.add(1e9 * max(rates) if max(rates) else 1.0)
    return sorted(rates)


def _best_points(
    points: Sequence[Sequence[Point]], flight: int, rate: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    best: Mapping[tuple[Point, ...], Point] = {
        frontier: min(
            frontier,
            key=lambda p: (
                p.seconds + rate * (p.standing_bytes + flight * p.saved_bytes),
                p.seconds,
            ),
        )
        for frontier in {tuple(f) for f in points}
    }
    chosen = [best[tuple(f)] for f in points]
    return (
        np.array([p.seconds for p in chosen]),
        np.array([p.standing_bytes + flight * p.saved_bytes for p in chosen]),
        np.array([p.transient_bytes for p in chosen]),
    )


def _range_sums(values: FloatArray) -> FloatArray:
    """[i, j] = sum of values[i..j] for i <= j."""
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(prefix[None, 1:] - prefix[:-1, None])


def _range_maxima(values: FloatArray) -> FloatArray:
    """[i, j] = max of values[i..j] for i <= j."""
    out = np.zeros((len(values), len(values)))
    for i in range(len(values)):
        out[i, i:] = np.maximum.accumulate(values[i:])
    return out


def boundary_bytes(graph: Graph) -> FloatArray:
    """[K]: bytes that cross into layer k from earlier layers per microbatch, forward values and the
    gradients that come back. O(edges)."""
    num_layers = len(graph.layer_names)
    metas = graph.metas()
    layer_of = {ref: op.layer for op in graph.operators for ref in op.refs}
    reach: dict[Ref, tuple[int, int]] = {}
    for op in graph.operators:
        for ref in op.operands:
            if ref in layer_of and layer_of[ref] != op.layer:
                low, high = sorted((layer_of[ref], op.layer))
                old = reach.get(ref, (low, high))
                reach[ref] = (min(old[0], low), max(old[1], high))
    crossing = np.zeros(num_layers)
    for ref, (low, high) in reach.items():
        crossing[low + 1 : high + 1] += metas[ref].nbytes
    return crossing
