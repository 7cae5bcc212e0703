"""Interleaved pipelines: equal submeshes, each with several short stages.

A pipeline of p workers has v p stages, stage s on submesh s mod p; layers are shared out evenly by
their seconds in the tables. Its expected step is that of its schedule, played with these seconds.
Each stage has a v-th of its device's budget, and its fastest solution has to fit it: where memory
binds, more microbatches in flight do not pay.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from autopar.candidate import Cut
from autopar.mesh import LogicalMesh, Submesh
from autopar.schedule import ScheduleKind
from autopar.search.cuts import CutSearch
from autopar.search.prices import Level
from autopar.search.schedules import Expected, expected_seconds

_STAGES_PER_WORKER = (2, 4)


def interleaved_cuts(search: CutSearch, best_s: Callable[[], float]) -> Iterator[Cut]:
    """Those that are expected to take less than the best step so far, the fastest first."""
    space = search.space
    if len(space.cluster.groups) > 1:
        return
    heap: list[tuple[float, int, Cut]] = []
    for count, submesh in itertools.product(space.microbatch_counts, space.submeshes):
        workers, rest = divmod(space.cluster.num_devices, submesh.num_devices)
        told = space.options.num_stages in (None, workers)
        if submesh in search.sizes[count] and told and not (rest or count % workers):
            heap += [
                (cut.seconds, len(heap) + order, cut)
                for order, cut in enumerate(_cuts(search, count, submesh, workers, best_s()))
            ]
    heapq.heapify(heap)
    while heap:
        seconds, order, cut = heapq.heappop(heap)
        if seconds >= best_s():
            return
        view, count = cut.views[0][0][1], cut.num_microbatches
        if search.prices.level(view, count) >= Level.FREE:
            yield cut
            continue
        search.raise_views({view: True}, count)
        workers, chunks = cut.num_stages // cut.stages_per_worker, cut.stages_per_worker
        again = _cut(search, count, cut.submeshes[0], view, workers, chunks)
        if again is not None:
            heapq.heappush(heap, (again.seconds, order, again))


def _cuts(
    search: CutSearch, count: int, submesh: Submesh, workers: int, best_s: float
) -> Iterator[Cut]:
    """On the view that is fastest, whatever fits."""
    known = [v for v in search.space.views[submesh] if search.prices.known(v, count)]
    if workers < 2 or not known:
        return
    work_s = {view: math.fsum(_layer_seconds(search, view, count)) for view in known}
    view = min(known, key=work_s.__getitem__)
    if count * work_s[view] / workers >= best_s:
        return
    for chunks in _STAGES_PER_WORKER:
        if workers * chunks <= search.num_layers:
            cut = _cut(search, count, submesh, view, workers, chunks)
            if cut is not None:
                yield cut


def _cut(
    search: CutSearch, count: int, submesh: Submesh, view: LogicalMesh, workers: int, chunks: int
) -> Cut | None:
    """None where some stage does not fit."""
    seconds = _layer_seconds(search, view, count)
    num_stages = workers * chunks
    cut = Cut(
        first_layers=_even(seconds, num_stages),
        submeshes=(submesh,) * num_stages,
        views=(((math.fsum(seconds) / num_stages, view),),) * num_stages,
        seconds=0.0,
        num_microbatches=count,
        schedule=ScheduleKind.INTERLEAVED,
        num_workers=workers,
    )
    stages = _stages(search, cut, view, seconds)
    if stages is None:
        return None
    return replace(cut, seconds=expected_seconds(stages, count, cut.schedule, workers))


def _stages(
    search: CutSearch, cut: Cut, view: LogicalMesh, seconds: Sequence[float]
) -> list[Expected] | None:
    """seconds: of each layer. None where some stage does not fit."""
    count = cut.num_microbatches
    received = search.transfers(count)[:, search.space.submeshes.index(cut.submeshes[0])]
    budget = search.space.budget_of(view) / cut.stages_per_worker
    stages = []
    for index, bounds in enumerate(itertools.pairwise([*cut.first_layers, search.num_layers])):
        first, stop = bounds
        layers = search.counts[search.index[first, stop - 1]]
        flight = cut.in_flight(index)
        parts = search.prices.stage_parts(view, count, layers, flight, math.inf)
        if parts.rest_bytes + flight * parts.saved_bytes > budget:
            return None
        each_s = max(0.0, math.fsum(seconds[first:stop]) - parts.once_s)
        stages.append(Expected(each_s, float(received[first]), count * parts.once_s))
    return stages


def _layer_seconds(search: CutSearch, view: LogicalMesh, count: int) -> list[float]:
    """Of each layer of the model."""
    frontiers = search.prices.frontiers(view, count)
    return [frontiers[kind][0].seconds for kind in search.reference.kind_of_layer]


def _even(seconds: list[float], num_stages: int) -> tuple[int, ...]:
    """First layers of consecutive stages of nearly equal seconds, each with a layer at least."""
    starts_at = np.concatenate([[0.0], np.cumsum(seconds)])
    starts = [0]
    for stage in range(1, num_stages):
        share = starts_at[-1] * stage / num_stages
        nearest = int(np.argmin(np.abs(starts_at - share)))
        low, high = starts[-1] + 1, len(seconds) - (num_stages - stage)
        starts.append(min(max(nearest, low), high))
    return tuple(starts)
