"""Which numbers of microbatches and which sizes of submeshes are worth a stage cut of their own.

Equal stages on equal submeshes have a closed form: with S stages, each an S-th of all layers,

    step(B, view) = (B - 1 + S) (t(view, layers / S, in flight of the first stage) + transfer)

It is evaluated for every number of microbatches and every view, priced as far as the most promising
of them go. A view that is not priced at all is bounded by the smallest submesh's
seconds in proportion to the devices: more are not saved. Cuts are then made only for the numbers of
microbatches that come near the best, with submeshes about as large as the best ones have.
Clusters of several groups have no equal stages: there everything is kept.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from autopar.mesh import LogicalMesh, Submesh
from autopar.search.clock import Clock
from autopar.search.prices import Level, Prices
from autopar.search.program import Program
from autopar.search.space import Space

_NEAR = 1.03  # of the best equal pipeline: what is kept
_MOST = 3  # numbers of microbatches
# What bounds are expected to rise by until they are exact: of views that are not priced, of other
# numbers of microbatches, of solutions that do not fit. Empirical.
_LOOSE, _LOOSE_SCALED, _LOOSE_FREE = 1.25, 1.08, 1.03
_SIZES = 2  # submeshes between a half and twice the best sizes are kept


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """Equal stages."""

    num_microbatches: int
    submesh: Submesh
    view: LogicalMesh
    num_stages: int


def focus(
    space: Space,
    prices: Prices,
    reference: Program,
    transfer: Callable[[int, Submesh], float],
    raise_views: Callable[[dict[LogicalMesh, bool], int], None],
    clock: Clock,
) -> Space:
    """The space with only what is near the best equal pipeline. transfer: mean seconds that a stage
    spends receiving, by number of microbatches and submesh."""
    if len(space.cluster.groups) > 1:
        return space
    devices = space.cluster.num_devices
    search = _Uniform(space, prices, reference, transfer)
    pipelines = [
        _Pipeline(count, submesh, view, devices // submesh.num_devices)
        for count in space.microbatch_counts
        for submesh in space.submeshes
        for view in space.views[submesh]
        if search.allowed(submesh)
    ]
    if not pipelines:
        return space
    first = space.microbatch_counts[0]
    smallest = min((p.submesh for p in pipelines), key=lambda s: s.num_devices)
    raise_views(dict.fromkeys(space.views[smallest], True), first)
    search.least = smallest
    heap = [(search.step(p)[0], order, p) for order, p in enumerate(pipelines)]
    heapq.heapify(heap)
    kept: list[tuple[float, _Pipeline]] = []
    while heap and not (kept and clock.expired):
        bound, order, pipeline = heapq.heappop(heap)
        if kept and bound > _NEAR * kept[0][0]:
            break
        seconds, exact, fits = search.step(pipeline)
        if math.isinf(seconds):
            continue
        if seconds > bound * (1 + 1e-9):
            heapq.heappush(heap, (seconds, order, pipeline))  # it was priced higher since
        elif exact:
            kept.append((seconds, pipeline))
        else:
            raise_views({pipeline.view: fits}, pipeline.num_microbatches)
            heapq.heappush(heap, (search.step(pipeline)[0], order, pipeline))
    return _focused(space, kept) if kept else space


def _focused(space: Space, kept: list[tuple[float, _Pipeline]]) -> Space:
    counts = list(dict.fromkeys(p.num_microbatches for _, p in kept))[:_MOST]
    sizes = {p.submesh.num_devices for _, p in kept if p.num_microbatches in counts}
    low, high = min(sizes) / _SIZES, max(sizes) * _SIZES
    submeshes = tuple(s for s in space.submeshes if low <= s.num_devices <= high)
    return replace(
        space,
        microbatch_counts=tuple(sorted(counts)),
        submeshes=submeshes,
        views={s: space.views[s] for s in submeshes},
    )


class _Uniform:
    """The closed form over the prices known (a builder, local to one search)."""

    def __init__(
        self,
        space: Space,
        prices: Prices,
        reference: Program,
        transfer: Callable[[int, Submesh], float],
    ) -> None:
        self._space, self._prices, self._transfer = space, prices, transfer
        self._devices = space.cluster.num_devices
        self._layers = reference.num_layers
        self._counts = np.bincount(reference.kind_of_layer, minlength=len(reference.classes))
        self.least: Submesh | None = None

    def allowed(self, submesh: Submesh) -> bool:
        pinned = self._space.options.num_stages
        stages, rest = divmod(self._devices, submesh.num_devices)
        return rest == 0 and stages <= self._layers and stages == (pinned or stages)

    def step(self, pipeline: _Pipeline) -> tuple[float, bool, bool]:
        """(seconds, exact, whether the fastest solutions fit)."""
        stages, count = pipeline.num_stages, pipeline.num_microbatches
        seconds, exact, fits = self._stage(pipeline)
        seconds += self._transfer(count, pipeline.submesh) if stages > 1 else 0.0
        return (count - 1 + stages) * seconds * self._trust(pipeline, exact), exact, fits

    def _trust(self, pipeline: _Pipeline, exact: bool) -> float:
        """What a bound is expected to rise by: bounds are loose, and without it nearly everything
        would be priced before anything is exact."""
        if exact:
            return 1.0
        if not self._prices.known(pipeline.view):
            return _LOOSE
        level = self._prices.level(pipeline.view, pipeline.num_microbatches)
        return _LOOSE_SCALED if level is Level.SCALED else _LOOSE_FREE

    def _stage(self, pipeline: _Pipeline) -> tuple[float, bool, bool]:
        stages, count, view = pipeline.num_stages, pipeline.num_microbatches, pipeline.view
        if self._prices.known(view):
            in_flight = min(count, stages)
            share = self._counts[None] / stages
            priced = self._prices.stage_seconds(
                view, count, share, in_flight, self._space.budget_of(view)
            )
            return float(priced.seconds[0]), bool(priced.exact[0]), bool(priced.fits[0])
        assert self.least is not None
        known = [
            self._prices.stage_seconds(v, count, self._counts[None] / stages, 1, math.inf)
            for v in self._space.views[self.least]
        ]
        ideal = self.least.num_devices / pipeline.submesh.num_devices
        return ideal * min(float(k.seconds[0]) for k in known), False, True
