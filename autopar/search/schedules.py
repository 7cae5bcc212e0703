"""The schedule of a cut whose stages are solved: the fastest one, simulated, of those that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from typing import NamedTuple

from autopar.actions import ActionKind
from autopar.candidate import Candidate, Cut
from autopar.errors import NoFeasiblePlan
from autopar.intraop.stage import StageSolution
from autopar.pace import Pace, pace
from autopar.schedule import ScheduleKind
from autopar.search.space import WEIGHT_SHARE, Space
from autopar.simulate import StageCost, Transfer

_ROUNDING = 1 + 1e-6
_MANY_CELLS = 20_000  # of a schedule: stages x microbatches
_FORWARD_SHARE = 1 / 3  # of a stage's seconds
_WORTH_ROOM = 0.99  # of the step: stages are not solved again for less
_MOST_ROOM = 1.4  # of the budget: what holds more does not come to fit without much being slower
_FEW = 128  # microbatches: so many more than fill and drain a pipeline show its pace


class Expected(NamedTuple):
    """What is known of a stage before it is solved. Seconds: forward and backward of a microbatch;
    what it receives for one, both ways; once-per-step work."""

    seconds: float
    receive_s: float
    once_s: float


class HoldsTooMuch(NoFeasiblePlan):
    """Stages that fit alone, and not under their schedule. room: microbatches that each would need
    room for."""

    def __init__(self, message: str, least_bytes: float, room: int) -> None:
        super().__init__(message, least_bytes=least_bytes)
        self.room = room


def best_schedule(
    space: Space, cut: Cut, transfers: Sequence[Transfer], stages: tuple[StageSolution, ...]
) -> Candidate:
    """The cut under the schedule that is fastest, of those that fit; the first of equal ones.
    HoldsTooMuch where none fits. ZB-H1 may hold more than stages have room for: between its B and W
    a microbatch holds other values than before."""
    costs = [StageCost.of(stage.prediction) for stage in stages]
    kinds = _kinds(space, cut)
    if len(kinds) > 1:
        kinds = sorted(kinds, key=lambda kind: _played(cut, costs, transfers, kind, few=True)[1])
    budgets = [space.budget_of(s.mesh) for s in stages[: cut.num_workers or len(stages)]]
    for kind in kinds:
        played, step_s = _played(cut, costs, transfers, kind)
        peaks = played.worker_peak_bytes
        fits = all(p <= b * _ROUNDING for p, b in zip(peaks, budgets, strict=True))
        if kind is cut.schedule and cut.num_workers is None and not kind.splits_backward:
            return Candidate(cut, stages, step_s, kind, tuple(transfers))
        if fits:
            held = tuple(map(_with_peak, stages, played.peak_bytes))
            return Candidate(cut, held, step_s, kind, tuple(transfers))
    raise HoldsTooMuch(
        f"under the schedule {kind} some device would hold {max(peaks) / 2**30:.2f} GiB: more than"
        " the budget",
        max(peaks),
        _room(space, stages, played.peak_bytes),
    )


def room_for_faster(space: Space, solved: Candidate, below_s: float) -> int:
    """The microbatches that each stage needs room for under a schedule that is faster than the
    candidate's but holds too much; 0 where there is none, it gains little on the candidate or on
    `below_s`, or it holds far too much."""
    best_s, room = _WORTH_ROOM * min(solved.step_s, below_s), 0
    costs = [StageCost.of(stage.prediction) for stage in solved.stages]
    for kind in _kinds(space, solved.cut):
        if kind is not solved.schedule:
            played, step_s = _played(solved.cut, costs, solved.transfers, kind, few=True)
            budgets = (_MOST_ROOM * space.budget_of(stage.mesh) for stage in solved.stages)
            near = all(p <= b for p, b in zip(played.peak_bytes, budgets, strict=True))
            if near and step_s < best_s:
                best_s, room = step_s, _room(space, solved.stages, played.peak_bytes)
    return room


def _room(space: Space, stages: Sequence[StageSolution], peaks: Sequence[float]) -> int:
    """Microbatches, as the stages save them, that come to the peaks of those that do not fit."""
    room = 0
    for stage, peak_bytes in zip(stages, peaks, strict=True):
        own = stage.prediction
        if peak_bytes > space.budget_of(stage.mesh) and own.saved_bytes:
            held_bytes = peak_bytes - own.standing_bytes - own.transient_bytes
            room = max(room, math.ceil(held_bytes / own.saved_bytes))
    return room


def expected_seconds(
    stages: Sequence[Expected],
    num_microbatches: int,
    kind: ScheduleKind,
    num_workers: int | None = None,
) -> float:
    """Of the step of stages that are not solved. num_workers: one for each by default."""
    costs = [
        StageCost(
            forward_s=stage.seconds * _FORWARD_SHARE,
            backward_s=stage.seconds * (1 - _FORWARD_SHARE),
            weight_s=stage.seconds * WEIGHT_SHARE,
            gather_s=stage.once_s / 2,
            reduce_s=stage.once_s / 2,
        )
        for stage in stages
    ]
    transfers = []
    for index in range(1, len(stages)):
        half_s = stages[index].receive_s / 2
        transfers.append(Transfer(index - 1, index, ActionKind.FORWARD, half_s))
        transfers.append(Transfer(index, index - 1, ActionKind.BACKWARD, half_s))
    cut = Cut((0,) * len(stages), (), (), 0.0, num_microbatches, num_workers=num_workers)
    return _played(cut, costs, transfers, kind)[1]


def rough_seconds(stages: Sequence[Expected], num_microbatches: int, bubble: float) -> float:
    """About the same, and seldom more, in O(stages).

    Stage s has f_s of the B microbatches in flight; t_s forward and backward of one, c_s its
    transfers, w the share of t_s that need not be waited for. Once all f_s are on their way, the
    next one enters when one has passed all stages that follow, and come back:

        round_s = t_s + sum over r > s of (1 - w) t_r + c_r
        late = max over s of  (B - f_s) max(0, round_s / f_s - max t)
        step = sum of t_s + c_s + (B - 1) max t + late
               - what w saves while the pipeline fills and drains

    Once-per-step work is waited for where the pipeline has not come so far, or is no longer there;
    or where it makes a stage the slowest.
    """
    share, last = (1 - bubble) / 2, len(stages) - 1
    most = max(stage.seconds for stage in stages)
    back = late_s = once_s = 0.0  # back: until a microbatch is back from the stages behind
    for index in range(last, -1, -1):
        seconds, receive_s, _ = stages[index]
        flight = min(num_microbatches, last - index + 1)
        late_s = max(late_s, (num_microbatches - flight) * ((seconds + back) / flight - most))
        back += (1 - share) * seconds + receive_s
    start = 0.0  # until a microbatch has come to a stage, and back from there
    for stage in stages:
        once_s = max(once_s, stage.once_s - start)
        start += stage.seconds + stage.receive_s
    filled = 1 + min(1.0, (num_microbatches - 1) / max(last, 1))
    saved = share * (fsum(stage.seconds for stage in stages) - most) * filled
    pipeline = start + (num_microbatches - 1) * most + late_s - saved + once_s
    return max(pipeline, max(num_microbatches * s.seconds + s.once_s for s in stages))


def _with_peak(stage: StageSolution, peak_bytes: float) -> StageSolution:
    """What a schedule holds beyond what the stage was solved for counts as transient."""
    more = peak_bytes - stage.prediction.peak_bytes
    if more <= 0:
        return stage
    transient = stage.prediction.transient_bytes + more
    return replace(stage, prediction=replace(stage.prediction, transient_bytes=transient))


def _kinds(space: Space, cut: Cut) -> list[ScheduleKind]:
    """The schedules that a cut can have, 1F1B first."""
    if cut.num_workers is not None:
        return [ScheduleKind.INTERLEAVED]
    if cut.num_stages == 1:
        return [space.schedules[0]]
    kinds: list[ScheduleKind] = [k for k in space.schedules if k is not ScheduleKind.INTERLEAVED]
    return kinds or [ScheduleKind.INTERLEAVED]


def _played(
    cut: Cut,
    costs: Sequence[StageCost],
    transfers: Sequence[Transfer],
    kind: ScheduleKind,
    *,
    few: bool = False,
) -> tuple[Pace, float]:
    """The pace, and the seconds of the step. Of very many microbatches those in the middle are
    alike: then the pace is that of fewer, and the rest is counted at it."""

    def play(count: int) -> Pace:
        return pace(kind, count, costs, transfers, cut.num_workers)

    count, workers = cut.num_microbatches, cut.num_workers or cut.num_stages
    some = min(4 * workers, 2 * workers + _FEW)
    if count <= 2 * some or (not few and count * cut.num_stages <= _MANY_CELLS):
        played = play(count)
        return played, played.step_s
    first, second = play(some), play(some + workers)
    pace_s = (second.step_s - first.step_s) / workers
    return second, first.step_s + (count - some) * pace_s
