"""The schedule of a cut whose stages are solved: the fastest one, simulated, of those that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.candidate import Candidate, Cut
from autopar.errors import NoFeasiblePlan
from autopar.intraop.stage import StageSolution
from autopar.pace import Pace, pace
from autopar.schedule import ScheduleKind
from autopar.search.space import Space
from autopar.simulate import StageCost, Transfer

_ROUNDING = 1 + 1e-6
_MANY_CELLS = 20_000  # of a schedule: stages x microbatches
_FEW = 128  # microbatches: so many more than fill and drain a pipeline show its pace


def best_schedule(
    space: Space, cut: Cut, transfers: Sequence[Transfer], stages: tuple[StageSolution, ...]
) -> Candidate:
    """The cut under the schedule that is fastest, of those that fit; the first of equal ones.
    NoFeasiblePlan where none fits."""
    costs = [StageCost.of(stage.prediction) for stage in stages]
    kinds = _kinds(space, cut)
    if len(kinds) > 1:
        kinds = sorted(kinds, key=lambda kind: _played(cut, costs, transfers, kind, few=True)[1])
    budgets = [space.budget_of(s.mesh) for s in stages[: cut.num_workers or len(stages)]]
    for kind in kinds:
        played, step_s = _played(cut, costs, transfers, kind)
        peaks = played.worker_peak_bytes
        fits = all(p <= b * _ROUNDING for p, b in zip(peaks, budgets, strict=True))
        if kind is cut.schedule and cut.num_workers is None:
            return Candidate(cut, stages, step_s, kind)
        if fits:
            held = tuple(map(_with_peak, stages, played.peak_bytes))
            return Candidate(cut, held, step_s, kind)
    raise NoFeasiblePlan(
        f"under the schedule {kinds[0]} some device would hold"
        f" {max(peaks) / 2**30:.2f} GiB: more than the budget",
        least_bytes=max(peaks),
    )


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
