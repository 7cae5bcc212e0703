"""The schedule of a cut whose stages are solved: the fastest one, simulated, of those that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.candidate import Candidate, Cut, simulate_stages
from autopar.errors import NoFeasiblePlan
from autopar.graph.program import Graph
from autopar.intraop.stage import StageSolution
from autopar.schedule import ScheduleKind
from autopar.search.space import Space
from autopar.simulate import Timeline

_ROUNDING = 1 + 1e-6
_MANY_CELLS = 20_000  # of a schedule: stages x microbatches


def best_schedule(
    space: Space, cut: Cut, graphs: Sequence[Graph], stages: tuple[StageSolution, ...]
) -> Candidate:
    """The cut under the schedule that simulates fastest, of those that fit; the first of equal
    ones. NoFeasiblePlan where none fits."""
    kinds = _kinds(space, cut)
    if len(kinds) > 1:
        kinds = sorted(kinds, key=lambda kind: _quick_step(cut, graphs, stages, kind))
    budgets = [space.budget_of(s.mesh) for s in stages[: cut.num_workers or len(stages)]]
    for kind in kinds:
        timeline, step_s = _played(cut, graphs, stages, kind)
        peaks = timeline.worker_peak_bytes
        fits = all(p <= b * _ROUNDING for p, b in zip(peaks, budgets, strict=True))
        if kind is cut.schedule and cut.num_workers is None:
            return Candidate(cut, stages, timeline, step_s, kind)
        if fits:
            held = tuple(map(_with_peak, stages, timeline.peak_bytes))
            return Candidate(cut, held, timeline, step_s, kind)
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


def _quick_step(
    cut: Cut, graphs: Sequence[Graph], stages: tuple[StageSolution, ...], kind: ScheduleKind
) -> float:
    """Seconds of the step, few microbatches played."""
    return _played(cut, graphs, stages, kind, few=True)[1]


def _played(
    cut: Cut,
    graphs: Sequence[Graph],
    stages: tuple[StageSolution, ...],
    kind: ScheduleKind,
    *,
    few: bool = False,
) -> tuple[Timeline, float]:
    """The timeline, and the seconds of the step. Of very many microbatches those in the middle are
    alike: then the timeline is that of fewer, and the rest is counted at their pace."""

    def play(count: int) -> Timeline:
        return simulate_stages(graphs, stages, kind, count, num_workers=cut.num_workers)

    count, workers = cut.num_microbatches, cut.num_workers or cut.num_stages
    some = 4 * workers
    if count <= 2 * some or (not few and count * cut.num_stages <= _MANY_CELLS):
        timeline = play(count)
        return timeline, timeline.step_s
    first, second = play(some), play(some + workers)
    pace_s = (second.step_s - first.step_s) / workers
    return second, first.step_s + (count - some) * pace_s
