"""Layers to stages: a frontier of (seconds, bytes) per layer class, and stage costs made of it.

Each distinct layer is solved alone on each mesh view, under each recompute policy and at several
prices of a byte; its boundary values may come and go in any layout, and where a layer reads and
makes values of one shape their layouts are priced as if the same layer followed. A stage with n_c
layers of class c and f microbatches in flight then mixes points of each class at one price l:

    p_c(l, f) = argmin over points p of class c:  seconds(p) + l (standing(p) + f saved(p))
    S(l) = sum_c n_c seconds(p_c),   N(l) = sum_c n_c bytes(p_c) + max_c transient(p_c)
    t(f, n) = S at the smallest l with N(l) <= M; between the last price that does not fit and the
              first that does, layers change one after the other: linear between the two

which is the linear relaxation of choosing a point for every layer, up to the maximum of the
transients. These costs steer the inter-op search; the stages that it picks are solved again whole.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.estimate import MeshCosts
from autopar.graph.program import Graph, Ref
from autopar.graph.split import weight_operators
from autopar.intraop.build import build_problem
from autopar.intraop.execution import execution_of
from autopar.intraop.free import Effort, Priced
from autopar.intraop.ilp import infeasible
from autopar.intraop.memory_use import gradient_bytes, transient_bytes
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.shares import weight_bytes
from autopar.intraop.stage_problem import Node, ParameterChoice, Part, StageContext, StageProblem
from autopar.intraop.sweep import WarmMessages
from autopar.layout import Layout
from autopar.plan import Remat
from autopar.sharding.registry import RuleTable
from autopar.sharding.strategy import Strategy

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Prices of a byte, as multiples of (free optimum's seconds / its bytes): from "free" to "least
# bytes".
PRICES = (0.0, 0.1, 1.0, 10.0)
# Points steer: this is good enough for that.
_POINT_GAP = 1e-3
_POINT_SWEEPS = 40  # of each round
_POINT_TABLE = 200_000  # entries that elimination may build


@dataclass(frozen=True, slots=True)
class Point:
    """One solution of one layer on one mesh view. Seconds per microbatch, bytes per device.
    once_s: the share of seconds that comes once per step, spread over its microbatches.
    held_bytes: what a microbatch holds between B and W in place of its saved bytes, where the
    schedule splits backward."""

    seconds: float
    standing_bytes: float
    saved_bytes: float
    transient_bytes: float
    remat: Remat = Remat.NONE
    once_s: float = 0.0
    held_bytes: float = 0.0

    def scaled(self, factor: float) -> Point:
        """As if a microbatch had `factor` times the rows."""
        return replace(
            self,
            seconds=self.seconds * factor,
            saved_bytes=self.saved_bytes * factor,
            transient_bytes=self.transient_bytes * factor,
            once_s=self.once_s * factor,
            held_bytes=self.held_bytes * factor,
        )


Frontier = tuple[Point, ...]


def layer_points(
    graph: Graph,
    table: RuleTable,
    costs: MeshCosts,
    context: StageContext,
    *,
    remat: Remat = Remat.NONE,
    prices: Sequence[float] = PRICES,
    deadline: float = math.inf,
    alone: bool = False,
    optimistic: bool = False,
) -> Frontier:
    """The layer's solutions at each price, duplicates removed, the fastest first. remat: the policy
    that the graph was recomputed with. deadline: of time.monotonic(); the free solution is always
    there. alone: boundary values come and go for nothing, and seconds are lower bounds: no stage
    with the layer takes fewer for it. optimistic: one point, with the seconds of the fastest
    solution and the fewest bytes of any."""
    built = build_problem(graph, table, costs, context)
    problem = without_boundary(built) if alone else _with_cycle(built, costs)
    effort = Effort(
        deadline=deadline,
        target_gap=_POINT_GAP,
        allow_mip=False,
        table_limit=_POINT_TABLE,
        close_enough=_POINT_GAP,
        near=10 * _POINT_GAP,
        max_sweeps=_POINT_SWEEPS,
    )
    points: dict[tuple[int, ...], Point] = {}  # by choice
    priced = Priced(problem)
    warm: WarmMessages = {}
    free_rate = 0.0
    for price in prices:
        if points and time.monotonic() > deadline:
            break
        rate = price * free_rate
        found = priced.minimise(rate, effort=effort, warm=warm)
        if found.choice is None:
            raise infeasible(problem)
        point = points.get(found.choice)
        if point is None:
            point = _point(graph, built, found.choice, costs, context, remat)
        if alone:
            nbytes = zip(problem.node_bytes, found.choice, strict=True)
            bound = found.bound - rate * math.fsum(float(m[i]) for m, i in nbytes)
            point = replace(point, seconds=max(0.0, min(point.seconds, bound)))
        if price == 0.0:
            total = point.standing_bytes + point.saved_bytes
            free_rate = point.seconds / total if total else 0.0
        points[found.choice] = point
    if optimistic:
        return (_with_fewest_bytes(next(iter(points.values())), built),)
    return undominated(points.values())


def undominated(points: Iterable[Point]) -> Frontier:
    """The points that no other one beats in seconds and all bytes but those held for W, the
    fastest first."""
    ordered = sorted(
        dict.fromkeys(points),
        key=lambda p: (p.seconds, p.standing_bytes, p.saved_bytes, p.transient_bytes),
    )
    kept: list[Point] = []
    for point in ordered:
        if not any(
            q.standing_bytes <= point.standing_bytes
            and q.saved_bytes <= point.saved_bytes
            and q.transient_bytes <= point.transient_bytes
            for q in kept
        ):
            kept.append(point)
    return tuple(kept)


def without_boundary(built: StageProblem) -> IntraOpProblem:
    """Received values cost nothing, in any layout."""
    seconds = tuple(
        np.where(np.isfinite(c_v), 0.0, c_v)
        if node.kind == "input" and node.name in built.received
        else c_v
        for node, c_v in zip(built.nodes, built.problem.node_seconds, strict=True)
    )
    return replace(built.problem, node_seconds=seconds)


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
    remat: Remat,
) -> Point:
    nbytes = built.kind_bytes(choice)
    chosen = built.read(choice)
    sizes, saved = costs.mesh.axis_sizes, nbytes["saved"] / context.in_flight
    if context.num_microbatches == 1:  # its gradients come as its saved values go
        saved = max(saved, gradient_bytes(graph, built.dims, chosen.outputs, sizes))
    return Point(
        seconds=built.problem.seconds(choice) - _receive_seconds(built, choice),
        standing_bytes=nbytes["parameter"] + nbytes["gradient"],
        saved_bytes=saved,
        transient_bytes=transient_bytes(
            graph,
            built.dims,
            chosen.strategies,
            chosen.inputs,
            sizes,
            outputs=chosen.outputs,
            execution=execution_of(graph, context),
        ),
        remat=remat,
        once_s=built.part_seconds(choice)[Part.STEP],
        held_bytes=weight_bytes(graph, built, chosen, sizes, weight_operators(graph)),
    )


def _with_fewest_bytes(point: Point, built: StageProblem) -> Point:
    nbytes = dict.fromkeys(("parameter", "gradient", "saved", ""), 0.0)
    for name, sizes in zip(built.byte_kinds, built.problem.node_bytes, strict=True):
        nbytes[name] += float(sizes.min())
    return replace(
        point,
        standing_bytes=nbytes["parameter"] + nbytes["gradient"],
        saved_bytes=nbytes["saved"],
        transient_bytes=0.0,
    )


def _receive_seconds(built: StageProblem, choice: tuple[int, ...]) -> float:
    """What the layer alone pays for values that in a stage its neighbour has."""
    return math.fsum(
        float(built.problem.node_seconds[i][choice[i]])
        for i, node in enumerate(built.nodes)
        if node.kind == "input" and node.name in built.received
    )


class Mixture(NamedTuple):
    """What a stage is made of at one price: `share` of the layers are at `small`, the rest at
    `fast`, both one point per class."""

    fast: Frontier
    small: Frontier
    share: float


def stage_seconds(
    frontiers: Sequence[Frontier],
    counts: IntArray | FloatArray,
    in_flight: int,
    budget_bytes: float,
) -> FloatArray:
    """[U]: t(f, n) of the module docstring, inf where nothing fits.

    frontiers: of each class. counts: [U, classes] layers of each class. O(U x prices x classes).
    """
    steps = _steps(frontiers, in_flight)
    seconds, need = _sums(steps, counts, in_flight)
    fits = need <= budget_bytes
    first = np.argmax(fits, axis=0)  # of the prices, per stage
    column = np.arange(counts.shape[0])
    out = np.where(fits.any(axis=0), seconds[first, column], np.inf)
    before = np.maximum(first - 1, 0)
    mixed = fits.any(axis=0) & (first > 0)
    high, low = need[before, column], need[first, column]
    share = np.clip((high - budget_bytes) / np.where(mixed, high - low, 1.0), 0.0, 1.0)
    between = seconds[before, column] + share * (out - seconds[before, column])
    return np.where(mixed, between, out)


def stage_mixture(
    frontiers: Sequence[Frontier],
    counts: IntArray | FloatArray,
    in_flight: int,
    budget_bytes: float,
) -> Mixture | None:
    """What t(f, n) of one stage is made of; None where nothing fits. counts: [classes]."""
    steps = _steps(frontiers, in_flight)
    _, need = _sums(steps, counts[None], in_flight)
    fitting = np.flatnonzero(need[:, 0] <= budget_bytes)
    if not fitting.size:
        return None
    first = int(fitting[0])
    if first == 0:
        return Mixture(steps[0], steps[0], 0.0)
    high, low = need[first - 1, 0], need[first, 0]
    share = min(1.0, max(0.0, (high - budget_bytes) / (high - low)))
    return Mixture(steps[first - 1], steps[first], float(share))


def eased_mixture(
    frontiers: Sequence[Frontier],
    counts: IntArray | FloatArray,
    in_flight: int,
    mixture: Mixture,
    layers: float,
) -> Mixture:
    """With so many layers fewer under the policy that its price had them take, those of the highest
    price first. mixture: of `stage_mixture`."""
    steps = _steps(frontiers, in_flight)
    share = mixture.share
    for fast, small in reversed(list(itertools.pairwise(steps[: steps.index(mixture.small) + 1]))):
        policies = zip(counts, fast, small, strict=True)
        changed = float(sum(n for n, p, q in policies if p.remat is not q.remat))
        if share * changed > layers:
            return Mixture(fast, small, share - layers / changed)
        layers -= share * changed
        share = 1.0
    return Mixture(steps[0], steps[0], 0.0)


class StageParts(NamedTuple):
    """Of a stage that takes t(f, n): the share that comes once per step; bytes whatever is in
    flight; bytes of a microbatch until B, and from then on until W."""

    once_s: float
    rest_bytes: float
    saved_bytes: float
    held_bytes: float


def stage_parts(
    frontiers: Sequence[Frontier],
    counts: IntArray | FloatArray,
    in_flight: int,
    budget_bytes: float,
) -> StageParts:
    """Of one stage; of its fastest points where nothing fits. counts: [classes]."""
    mixture = stage_mixture(frontiers, counts, in_flight, budget_bytes)
    mixture = mixture or stage_mixture(frontiers, counts, in_flight, math.inf)
    assert mixture is not None
    sums = np.zeros(4)
    for points, weight in ((mixture.fast, 1 - mixture.share), (mixture.small, mixture.share)):
        for point, n in zip(points, counts.tolist(), strict=True):
            kept = point.once_s, point.standing_bytes, point.saved_bytes, point.held_bytes
            sums += weight * n * np.array(kept)
    transient = max(
        point.transient_bytes
        for points in (mixture.fast, mixture.small)
        for point, n in zip(points, counts.tolist(), strict=True)
        if n
    )
    once_s, standing, saved, held = sums.tolist()
    return StageParts(once_s, standing + transient, saved, held)


def smallest_points(frontiers: Sequence[Frontier], counts: IntArray, in_flight: int) -> Frontier:
    """Of each class the point of least bytes in a stage with so many layers of each."""

    def nbytes(point: Point, count: int) -> float:
        kept = point.standing_bytes + in_flight * point.saved_bytes
        return max(count, 1) * kept + point.transient_bytes

    return tuple(
        min(points, key=lambda p: (nbytes(p, int(count)), p.seconds))
        for points, count in zip(frontiers, counts, strict=True)
    )


def _steps(frontiers: Sequence[Frontier], in_flight: int) -> list[Frontier]:
    """The best point of each class at each price, prices rising; neighbours differ."""
    steps: dict[Frontier, None] = {}
    for rate in _rates(frontiers, in_flight):
        best = (
            min(
                points,
                key=lambda p: (
                    p.seconds + rate * (p.standing_bytes + in_flight * p.saved_bytes),
                    p.seconds,
                ),
            )
            for points in frontiers
        )
        steps[tuple(best)] = None
    return list(steps)


def _rates(frontiers: Sequence[Frontier], in_flight: int) -> list[float]:
    """Prices that separate the points: around every slope of the lower hull of a class."""
    rates = {0.0}
    for points in dict.fromkeys(frontiers):
        for fast, small in itertools.pairwise(_hull(points, in_flight)):
            slope = (small[0] - fast[0]) / (fast[1] - small[1])
            rates.update((slope * (1 - 1e-9), slope * (1 + 1e-9)))
    rates.add(1e9 * max(rates) if max(rates) else 1.0)
    return sorted(rates)


def _hull(points: Frontier, in_flight: int) -> list[tuple[float, float]]:
    """Lower convex hull of (seconds, bytes), bytes falling."""
    pairs = sorted({(p.seconds, p.standing_bytes + in_flight * p.saved_bytes) for p in points})
    hull: list[tuple[float, float]] = []
    for seconds, nbytes in pairs:
        if hull and nbytes >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (s0, b0), (s1, b1) = hull[-2:]
            if (s1 - s0) * (b0 - nbytes) >= (seconds - s0) * (b0 - b1):
                hull.pop()
            else:
                break
        hull.append((seconds, nbytes))
    return hull


def _sums(
    steps: Sequence[Frontier], counts: IntArray | FloatArray, in_flight: int
) -> tuple[FloatArray, FloatArray]:
    """[prices, U] seconds and bytes of stages with so many layers of each class."""
    seconds = np.array([[p.seconds for p in step] for step in steps])
    nbytes = np.array([[p.standing_bytes + in_flight * p.saved_bytes for p in s] for s in steps])
    transient = np.array([[p.transient_bytes for p in step] for step in steps])
    present = counts > 0
    most = np.zeros((len(steps), counts.shape[0]))
    for kind in range(counts.shape[1]):
        np.maximum(most, transient[:, kind, None] * present[None, :, kind], out=most)
    return layer_sums(seconds, counts), layer_sums(nbytes, counts) + most


def layer_sums(each: FloatArray, counts: IntArray | FloatArray) -> FloatArray:
    """[P, U]: each[P, classes] as often as counts[U, classes] says, one class after the other: a
    product of matrices sums in an order that depends on the processor."""
    sums = np.zeros((each.shape[0], counts.shape[0]))
    for of_class, number in zip(each.T, counts.T, strict=True):
        sums += of_class[:, None] * number[None]
    return sums


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
