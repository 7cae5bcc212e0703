"""Seconds and peak bytes of a pipeline step, without its events: what a search asks for.

The same streams as in ``simulate``, without overlap: times are maxima and sums along the order of
rows and prerequisites, so that any order of play gives them. Here every worker that can plays its
next action at once, as array operations over workers; there one action follows the other and
leaves an event. O(S B) numbers in O(S + B) array operations. Seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import fsum

import numpy as np
from numpy.typing import NDArray

from autopar.actions import ActionKind
from autopar.errors import ScheduleError
from autopar.schedule import ScheduleKind, schedule_rows
from autopar.simulate import StageCost, Transfer

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

_KINDS = (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT, ActionKind.REDUCE)
_FORWARD, _BACKWARD, _WEIGHT, _REDUCE = range(4)


@dataclass(frozen=True, slots=True)
class Pace:
    """As in `Timeline`: of the step, of each stage, of each worker."""

    step_s: float
    peak_bytes: tuple[float, ...]
    worker_peak_bytes: tuple[float, ...]


def pace(
    kind: ScheduleKind,
    num_microbatches: int,
    costs: Sequence[StageCost],
    transfers: Sequence[Transfer] = (),
    num_workers: int | None = None,
) -> Pace:
    """Of the schedule of that kind. costs: of each stage. num_workers: one per stage by default."""
    workers = len(costs) if num_workers is None else num_workers
    rows = _rows(kind, len(costs), num_microbatches, workers)
    return Pace(_step(rows, kind, costs, transfers, workers), *_peaks(rows, kind, costs, workers))


@lru_cache(maxsize=16)
def _rows(kind: ScheduleKind, stages: int, count: int, workers: int) -> IntArray:
    """[worker, position, (kind, stage, microbatch)]: all rows have as many actions."""
    number = {k: i for i, k in enumerate(_KINDS)}
    rows = schedule_rows(kind, stages, count, workers)
    return np.array(
        [[(number[a.kind], a.stage, a.microbatch or 0) for a in row] for row in rows], dtype=np.intp
    )


def _step(
    rows: IntArray,
    kind: ScheduleKind,
    costs: Sequence[StageCost],
    transfers: Sequence[Transfer],
    workers: int,
) -> float:
    stages, count = len(costs), int(rows[..., 2].max()) + 1
    worker = np.arange(workers)
    split = kind.splits_backward
    seconds = np.array([[cost.seconds(k, split=split) for cost in costs] for k in _KINDS])
    ready_s = np.array([fsum(c.gather_s for c in costs[w::workers]) for w in range(workers)])
    links = _Links(transfers, stages)
    # Ends by kind, stage + 1 and microbatch; inf until played. What has no prerequisite there
    # waits for the stages 0 and S + 1, which have ended.
    end = np.full((3, stages + 2, count), np.inf)
    end[:, [0, -1]] = 0.0
    arrived = np.zeros((2, stages, count))
    position, free = np.zeros(workers, dtype=np.intp), np.zeros(workers)
    length = rows.shape[1]
    while (playing := worker[position < length]).size:
        what, stage, number = rows[playing, position[playing]].T
        forward, backward, reduce = what == _FORWARD, what == _BACKWARD, what == _REDUCE
        need = end[np.where(forward, _FORWARD, _BACKWARD), stage + 1, number]
        before = end[
            np.where(forward, _FORWARD, _BACKWARD), np.where(forward, stage, stage + 2), number
        ]
        own = end[_FORWARD, stage + 1, number]
        need = np.where(what == _WEIGHT, need, np.where(backward, np.maximum(before, own), before))
        need[reduce] = 0.0
        ready = np.isfinite(need)
        if not ready.any():
            raise ScheduleError(f"the rows of {kind} wait for each other")
        active, what, stage, number = playing[ready], what[ready], stage[ready], number[ready]
        start = np.maximum(free[active], np.maximum(need[ready], ready_s[active]))
        passed = what < _WEIGHT
        start[passed] = np.maximum(
            start[passed], arrived[what[passed], stage[passed], number[passed]]
        )
        free[active] = start + seconds[what, stage]
        kept = what < _REDUCE
        end[what[kept], stage[kept] + 1, number[kept]] = free[active][kept]
        links.send(what, stage, number, free[active], arrived)
        position[active] += 1
    after = [fsum(c.step_s for c in costs[w::workers]) for w in range(workers)]
    return float((free + after).max())


class _Links:
    """The link streams: first in, first out."""

    def __init__(self, transfers: Sequence[Transfer], stages: int) -> None:
        self._source = np.array([t.source_stage for t in transfers], dtype=np.intp)
        self._target = np.array([t.target_stage for t in transfers], dtype=np.intp)
        self._kind = np.array([_KINDS.index(t.phase) for t in transfers], dtype=np.intp)
        self._seconds = np.array([t.seconds for t in transfers])
        self._free = np.zeros(len(transfers))
        self._played = np.full(stages, -1)
        self._number, self._ended = np.zeros(stages, dtype=np.intp), np.zeros(stages)

    def send(
        self,
        kind: IntArray,
        stage: IntArray,
        number: IntArray,
        ended: FloatArray,
        arrived: FloatArray,
    ) -> None:
        """What the actions that ended send; updates arrived[kind, stage, microbatch]."""
        if not len(self._source):
            return
        self._played[:] = -1
        self._played[stage], self._number[stage], self._ended[stage] = kind, number, ended
        (now,) = np.nonzero(self._played[self._source] == self._kind)
        source = self._source[now]
        self._free[now] = np.maximum(self._ended[source], self._free[now]) + self._seconds[now]
        places = self._kind[now], self._target[now], self._number[source]
        np.maximum.at(arrived, places, self._free[now])


def _peaks(
    rows: IntArray, kind: ScheduleKind, costs: Sequence[StageCost], workers: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each stage and worker. Actions of a worker follow each other, so that what it holds while
    one runs depends on its row only."""
    peaks, worker_peaks = [0.0] * len(costs), []
    for worker, row in enumerate(rows):
        what, stage = row[:, 0], row[:, 1]
        held_by_all = np.zeros(len(row))
        running = np.zeros(len(row))
        for own in range(worker, len(costs), workers):
            cost, mine = costs[own], stage == own
            after = cost.held_bytes_per_microbatch if kind.splits_backward else 0.0
            saved = cost.saved_bytes_per_microbatch
            begins = np.where(mine & (what == _FORWARD), saved, 0.0)
            ends = np.where(mine & (what == _BACKWARD), after - saved, 0.0)
            ends += np.where(mine & (what == _WEIGHT), -cost.held_bytes_per_microbatch, 0.0)
            held = cost.rest_bytes + begins.cumsum() + ends.cumsum() - ends
            transient = np.where(mine & (what != _REDUCE), cost.transient_bytes, 0.0)
            peaks[own] = float((held + transient).max())
            held_by_all += held
            running += transient
        worker_peaks.append(float((held_by_all + running).max()))
    return tuple(peaks), tuple(worker_peaks)
