"""Which numbers of microbatches and which sizes of submeshes are worth a stage cut of their own.

Equal stages on equal submeshes have a closed form: with S stages, each an S-th of all layers,

    step(B, view) = about (B - 1 + S) (t(view, layers / S, in flight of the first stage) - o) + B o

where o is the share of t that comes once per step: stages wait for it together. `rough_seconds`
says more, of stages that are as equal as whole layers make them.

A submesh of r small ones can at least do what r replicas of the small one do, each with an r-th of
the rows, whose gradients are summed over the replicas once per step:

    t(view, B) ~ t(best small view, r B) + all_reduce(gradients) / B

So only the small submeshes, those inside a node, are priced at once; of the large ones, those whose
estimate comes near the best pipeline that is priced exactly, best first. Estimates know the least
bytes of replicas, but not with how much recomputation they fit: what that adds is taken to be what
it added to the first pipeline that was priced exactly. Cuts are then made only for the numbers of
microbatches that come near the best, each with submeshes about as large as its best ones have.
Clusters of several groups have no equal stages: there everything is kept. All of this is a
heuristic: `Focus.note` says what was left out.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autopar.estimate import MeshCosts
from autopar.graph.program import InputKind
from autopar.graph.work import operator_flops
from autopar.intraop.compose import StageParts
from autopar.mesh import LogicalMesh, Submesh
from autopar.search.clock import Clock
from autopar.search.prices import Level, Prices
from autopar.search.program import Program
from autopar.search.schedules import Expected, rough_seconds
from autopar.search.space import Space

_NEAR = 1.03  # of the best equal pipeline: what is kept
_MOST = 3  # numbers of microbatches
_MORE_PRICED = 8  # views of large submeshes after the first exact pipeline: alternatives to it
# What bounds are expected to rise by until they are exact: of other numbers of microbatches, of
# solutions that do not fit, of estimates by replicas, of those that share a row. Empirical.
_LOOSE_SCALED, _LOOSE_FREE, _LOOSE_REPLICAS, _LOOSE_SHARED = 1.08, 1.03, 1.01, 1.25
_BISECTIONS = 30
_SIZES = 2  # submeshes between a half and twice the best sizes are kept
_ROWS_ANCHOR = 32  # small submeshes are priced at microbatches of this share of the rows, and fewer
_SHARE_OF_TIME = 1 / 3  # of the limit


RaiseViews = Callable[[Mapping[LogicalMesh, bool], int, tuple[int, int]], None]


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """Equal stages."""

    num_microbatches: int
    submesh: Submesh
    view: LogicalMesh
    num_stages: int


@dataclass(frozen=True, slots=True)
class Focus:
    """What is left of a space. sizes: the submeshes of each number of microbatches."""

    space: Space
    sizes: Mapping[int, tuple[Submesh, ...]]
    note: str = ""


def focus(
    space: Space,
    prices: Prices,
    reference: Program,
    mesh_costs: Callable[[LogicalMesh], MeshCosts],
    raise_views: RaiseViews,
    clock: Clock,
) -> Focus:
    """The space with only what is near the best equal pipeline. raise_views: with the numbers of
    microbatches that anchor the scaled prices."""
    everything = Focus(space, dict.fromkeys(space.microbatch_counts, space.submeshes))
    if len(space.cluster.groups) > 1:
        return everything
    search = _Uniform(space, prices, reference, mesh_costs, raise_views)
    anchors = search.anchors
    pipelines = [
        _Pipeline(count, submesh, view, space.cluster.num_devices // submesh.num_devices)
        for count in space.microbatch_counts
        for submesh in space.submeshes
        for view in space.views[submesh]
        if search.allowed(submesh)
    ]
    if not pipelines:
        return everything
    deadline = clock.started + _SHARE_OF_TIME * clock.limit_s
    small = [view for submesh in search.small for view in space.views[submesh]]
    for anchor in anchors:
        raise_views(dict.fromkeys(small, True), anchor, anchors)
    own = [p for p in pipelines if p.submesh in search.small]
    kept: dict[_Pipeline, float] = {}

    def look(some: Sequence[_Pipeline], *, first: bool = False) -> None:
        """Keeps those that are exact and near the best; first: the best alone."""
        more = _MORE_PRICED
        for seconds, pipeline, exact in search.ranked(some):
            if exact:
                kept[pipeline] = seconds
            elif not prices.known(pipeline.view, pipeline.num_microbatches):
                more -= 1
            best = min(kept.values(), default=math.inf)
            enough = kept and (first or more < 0)
            if enough or seconds > _NEAR * best or time.monotonic() > deadline:
                break

    look(own, first=True)
    for pipeline, seconds in kept.items():
        search.calibrate(pipeline, seconds)
    look(pipelines)
    look([p for p in pipelines if prices.known(p.view, p.num_microbatches)])
    if not kept:  # none fits, or out of time: the best that is known
        bounds = ((search.step(p)[0], n) for n, p in enumerate(pipelines))
        kept = {pipelines[n]: s for s, n in sorted(bounds)[:1] if math.isfinite(s)}
    return _focused(space, kept, len(pipelines)) if kept else everything


def _focused(space: Space, kept: Mapping[_Pipeline, float], looked_at: int) -> Focus:
    best = min(kept.values())
    near = [p for p in sorted(kept, key=lambda p: kept[p]) if kept[p] <= _NEAR * best]
    counts = tuple(sorted(list(dict.fromkeys(p.num_microbatches for p in near))[:_MOST]))
    sizes: dict[int, tuple[Submesh, ...]] = {}
    for count in counts:
        own = {p.submesh.num_devices for p in near if p.num_microbatches == count}
        low, high = min(own) / _SIZES, max(own) * _SIZES
        near_sizes = [s for s in space.submeshes if low <= s.num_devices <= high]
        sums = _sums({s.num_devices for s in near_sizes}, space.cluster.num_devices)
        sizes[count] = tuple(
            s for s in near_sizes if space.cluster.num_devices - s.num_devices in sums
        )
    used = {s for own in sizes.values() for s in own}
    submeshes = tuple(s for s in space.submeshes if s in used)
    narrowed = replace(
        space,
        microbatch_counts=counts,
        submeshes=submeshes,
        views={s: space.views[s] for s in submeshes},
    )
    note = "; ".join(
        f"{count} microbatches on submeshes of {', '.join(str(s.num_devices) for s in own)} devices"
        for count, own in sizes.items()
    )
    return Focus(
        narrowed,
        sizes,
        f"of {looked_at} equal pipelines the best are near {note}: other numbers and sizes were "
        "not cut into stages",
    )


def _filled(work: Sequence[float], most: float) -> list[float]:
    """Of consecutive layers put together while they are not above `most`: their work."""
    sums = [0.0]
    for layer in work:
        if sums[-1] + layer > most:
            sums.append(layer)
        else:
            sums[-1] += layer
    return sums


def _sums(sizes: set[int], most: int) -> set[int]:
    """The numbers of devices up to `most` that submeshes of these sizes make up."""
    sums = {0}
    for devices in range(min(sizes), most + 1, math.gcd(*sizes)):
        if any(devices - size in sums for size in sizes):
            sums.add(devices)
    return sums


class _Uniform:
    """The closed form over the prices known (a builder, local to one search)."""

    def __init__(
        self,
        space: Space,
        prices: Prices,
        reference: Program,
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        raise_views: RaiseViews,
    ) -> None:
        self._raise_views = raise_views
        self._space, self._prices, self._costs = space, prices, mesh_costs
        self._devices = space.cluster.num_devices
        self._reference = reference
        self._counts = np.bincount(reference.kind_of_layer, minlength=len(reference.classes))
        self._known_weights: dict[int, list[float]] = {}
        self._memory = 1.0  # what the budget adds to the fastest solutions
        fitting = [s for s in space.submeshes if self.allowed(s)]
        least = min(fitting, key=lambda s: s.num_devices, default=None)
        self.small = tuple(s for s in fitting if s.num_nodes == 1 or s == least)
        counts = space.microbatch_counts
        low = [c for c in counts if c * _ROWS_ANCHOR <= counts[-1]]
        # the most microbatches may have one row each, whose graph is not like the others
        self.anchors = (
            low[-1] if low else counts[0],
            counts[-1] if len(counts) < 3 else counts[-2],
        )

    def allowed(self, submesh: Submesh) -> bool:
        pinned = self._space.options.num_stages
        stages, rest = divmod(self._devices, submesh.num_devices)
        few = stages <= self._reference.num_layers
        return rest == 0 and few and stages == (pinned or stages)

    def ranked(self, pipelines: Sequence[_Pipeline]) -> Iterator[tuple[float, _Pipeline, bool]]:
        """Seconds, pipeline, and whether they are exact, the best first. A pipeline that is not
        exact is priced better when the next one is asked for, and comes again."""
        heap = [(self.step(p)[0], order, p) for order, p in enumerate(pipelines)]
        heapq.heapify(heap)
        while heap:
            bound, order, pipeline = heapq.heappop(heap)
            seconds, exact, fits = self.step(pipeline)
            if math.isinf(seconds):
                continue
            if seconds <= bound * (1 + 1e-9):  # else it was priced higher since
                yield seconds, pipeline, exact
                if exact:
                    continue
                count = pipeline.num_microbatches
                anchors = self.anchors if pipeline.submesh in self.small else (count, count)
                self._raise_views({pipeline.view: fits}, count, anchors)
            heapq.heappush(heap, (self.step(pipeline)[0], order, pipeline))

    def calibrate(self, pipeline: _Pipeline, seconds: float) -> None:
        """The first pipeline that is exact says what memory adds to an estimate."""
        free = self._seconds(pipeline, math.inf)
        self._memory = max(1.0, seconds / self._step_s(pipeline, free, 0.0))

    def _seconds(self, pipeline: _Pipeline, budget_bytes: float) -> float:
        """Of one of its stages, by the prices of its view."""
        stages, count = pipeline.num_stages, pipeline.num_microbatches
        share = self._counts[None] / stages
        priced = self._prices.stage_seconds(
            pipeline.view, count, share, min(count, stages), budget_bytes
        )
        return float(priced.seconds[0])

    def step(self, pipeline: _Pipeline) -> tuple[float, bool, bool]:
        """(seconds, exact, whether the fastest solutions fit). Each is taken to have room for
        ZB-H1: what has not may be interleaved."""
        seconds, exact, fits = self._stage(pipeline)
        if math.isinf(seconds):
            return seconds, exact, fits
        step_s = self._step_s(pipeline, seconds, self._once(pipeline))
        return step_s * self._trust(pipeline, exact, fits), exact, fits

    def _step_s(self, pipeline: _Pipeline, seconds: float, once_s: float) -> float:
        """Of stages of so many seconds per microbatch in the mean, of which a share comes once."""
        count, receive_s = pipeline.num_microbatches, self._transfer(pipeline)
        each_s = max(0.0, seconds - once_s)
        stages = [
            Expected(each_s * weight, receive_s if index else 0.0, count * once_s)
            for index, weight in enumerate(self._weights(pipeline.num_stages))
        ]
        return rough_seconds(stages, count, self._space.bubble)

    def _weights(self, num_stages: int) -> list[float]:
        """The work of each of so many stages over the mean: layers are not divided."""
        if num_stages not in self._known_weights:
            work, low = self._work, max(self._work)
            high = math.fsum(work)
            for _ in range(_BISECTIONS):
                most = (low + high) / 2
                if len(_filled(work, most)) <= num_stages:
                    high = most
                else:
                    low = most
            sums = _filled(work, high)
            sums += [0.0] * (num_stages - len(sums))
            mean = math.fsum(sums) / num_stages
            self._known_weights[num_stages] = [s / mean if mean else 1.0 for s in sums]
        return self._known_weights[num_stages]

    @cached_property
    def _work(self) -> list[float]:
        """FLOP of each layer of the model."""
        folded = self._reference.folded
        work, metas = [0.0] * len(folded.copies), folded.graph.metas()
        for op in folded.graph.operators:
            work[op.layer] += operator_flops(op, metas)
        return [w for w, times in zip(work, folded.copies, strict=True) for _ in range(times)]

    def _once(self, pipeline: _Pipeline) -> float:
        """The share of a stage's seconds that comes once per step."""
        if not self._prices.known(pipeline.view, pipeline.num_microbatches):
            return 0.0 if pipeline.submesh in self.small else self._reduction(pipeline)
        return self._parts(pipeline).once_s

    def _parts(self, pipeline: _Pipeline) -> StageParts:
        stages, count, view = pipeline.num_stages, pipeline.num_microbatches, pipeline.view
        budget, share = self._space.budget_of(view), self._counts / stages
        return self._prices.stage_parts(view, count, share, min(count, stages), budget)

    def _trust(self, pipeline: _Pipeline, exact: bool, fits: bool) -> float:
        """What a bound is expected to rise by: bounds are loose, and without it nearly everything
        would be priced before anything is exact."""
        if exact:
            return 1.0
        if not self._prices.known(pipeline.view, pipeline.num_microbatches):
            return _LOOSE_REPLICAS * self._memory
        level = self._prices.level(pipeline.view, pipeline.num_microbatches)
        loose = _LOOSE_SCALED if level is Level.SCALED else _LOOSE_FREE
        tight = (
            not fits and self._prices.optimistic(pipeline.view, pipeline.num_microbatches) is None
        )
        return max(loose, self._memory) if tight else loose

    def _stage(self, pipeline: _Pipeline) -> tuple[float, bool, bool]:
        stages, count, view = pipeline.num_stages, pipeline.num_microbatches, pipeline.view
        if not self._prices.known(view, count):
            if pipeline.submesh in self.small:  # too few microbatches
                return math.inf, False, False
            return self._replicas(pipeline), False, True
        priced = self._prices.stage_seconds(
            view,
            count,
            self._counts[None] / stages,
            min(count, stages),
            self._space.budget_of(view),
        )
        return float(priced.seconds[0]), bool(priced.exact[0]), bool(priced.fits[0])

    def _replicas(self, pipeline: _Pipeline) -> float:
        """Seconds of a stage of replicas of a small submesh, which share what stands between them;
        inf where that does not fit."""
        most = self._space.microbatch_counts[-1]
        in_flight = min(pipeline.num_microbatches, pipeline.num_stages)
        share = self._counts[None] / pipeline.num_stages
        least = math.inf
        for submesh in self.small:
            replicas, rest = divmod(pipeline.submesh.num_devices, submesh.num_devices)
            if rest:
                continue
            parts = pipeline.num_microbatches * replicas
            count = min(parts, most)  # above, one row is shared by several of them
            shared = 1.0 if count == parts else _LOOSE_SHARED * count / parts
            for view in self._space.views[submesh]:
                if self._prices.known(view, count):
                    points = [f[0] for f in self._prices.frontiers(view, count)]
                    pairs = zip(share[0].tolist(), points, strict=True)
                    standing = math.fsum(n * p.standing_bytes for n, p in pairs)
                    budget = self._space.budget_of(view) + standing * (1 - 1 / replicas)
                    found = self._prices.stage_seconds(view, count, share, in_flight, budget)
                    least = min(least, float(found.seconds[0]) * shared)
        return least + self._reduction(pipeline)

    def _reduction(self, pipeline: _Pipeline) -> float:
        """Seconds per microbatch of the sum of a stage's gradients over the nodes."""
        submesh = pipeline.submesh
        if submesh.num_nodes == 1:
            return 0.0
        shape = (submesh.num_nodes, submesh.devices_per_node)
        costs = self._costs(submesh.view(shape if shape[1] > 1 else shape[:1]))
        nbytes = self._parameter_bytes / pipeline.num_stages / submesh.devices_per_node
        return costs.all_reduce_seconds(nbytes, axis=0) / pipeline.num_microbatches

    def _transfer(self, pipeline: _Pipeline) -> float:
        """Mean seconds that a stage spends receiving."""
        if pipeline.num_stages == 1:
            return 0.0
        scale = self._reference.num_microbatches / pipeline.num_microbatches
        nbytes = scale * float(self._reference.crossing[1:].mean()) / pipeline.submesh.num_devices
        return self._costs(pipeline.view).receive_seconds(nbytes)

    @cached_property
    def _parameter_bytes(self) -> float:
        """Of the model."""
        folded = self._reference.folded
        own = {i.owner: i.rest_meta.nbytes for i in folded.graph.inputs_of(InputKind.PARAMETER)}
        return float(
            sum(
                count * sum(own.get(name, 0) for name in kind.owned)
                for kind, count in zip(self._reference.classes, self._counts, strict=True)
            )
        )
