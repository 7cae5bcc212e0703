"""Event-driven simulation of a pipeline step: schedule + stage costs -> timeline, seconds, bytes.

Decides nothing: it plays a schedule. Each worker has a compute stream, which plays its row in
order, and a collective stream for work once per step; each ordered pair of stages has a link
stream. Streams are first in, first out and run beside one another. With r(a) the prerequisites of
an action a (see ``schedule``), s its stage:

   gather(s)   from 0, the stages of a worker one after the other; with `overlap` on the collective
               stream, beside actions of the worker's other stages, else before the row
   start(a)    = max( end of the action before a in its row,  max over r(a) of end,
                      max over transfers into a of end,  end of gather(s) )
   end(a)      = start(a) + forward_s | backward_s | backward_s - weight_s | weight_s
   transfer    starts at max( end of its source action, end of the transfer before it on its link )
   R of s      reduce_s on the compute stream, or with `overlap` on the collective stream, from
               the start of the last action of s that makes gradients on, to its end at the earliest
   step_s      = max over stages of (end of R + the stage's step_s)
   bubble      = 1 - sum_s busy_s / (p step_s)     workers count the same, whatever their devices

Compute beside a collective takes `overlap_slowdown` times as long, as both want the same memory and
processors (the idea is Galvatron's: Miao et al., VLDB 2023; the default is an assumption, not a
measurement). The default is off: a pipeline's programs, and those of several microbatches, run one
after the other. One stage with one microbatch is one compiled program on GPUs, which does overlap:
of its gathers and reductions, in actions and once per step, its seconds have only what is exposed
(`estimate.EXPOSED_SHARE`), and `overlap` would hide them twice. Collectives inside an action are
part of its seconds.

   bytes of s at a time = rest + saved (F begun, B not ended) + held (B ended, W not ended)
                          + transient while an action of s runs

All seconds and bytes are per device of a stage. Links do not contend with one another, and a
received value that waits for its action is counted in saved_bytes_per_microbatch, not apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Final

from autopar.actions import Action, ActionKind, prerequisites
from autopar.errors import ScheduleError
from autopar.plan import StagePrediction
from autopar.schedule import Schedule, check_schedule, execution_order

COMPUTE_STREAM: Final = "compute"
COLLECTIVE_STREAM: Final = "collective"
GATHER_LABEL: Final = "gather"
STEP_LABEL: Final = "step"
OVERLAP_SLOWDOWN: Final = 1.1
_MICROBATCH_LETTERS: Final = "FBW"

Series = tuple[tuple[float, float], ...]  # (seconds, bytes from then on), by time


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage costs, per device of the stage. All values are finite and not negative."""

    forward_s: float  # of one microbatch
    backward_s: float  # of one microbatch, recomputation and W included
    reduce_s: float = 0.0  # the action R: gradient reductions, once per step
    step_s: float = 0.0  # other work once per step, after R, such as the optimizer
    rest_bytes: float = 0.0  # parameters, gradients, optimizer states
    saved_bytes_per_microbatch: float = 0.0
    transient_bytes: float = 0.0
    weight_s: float = 0.0  # the part of backward_s that W plays where backward is split
    gather_s: float = 0.0  # parameters, once per step, before the first forward
    held_bytes_per_microbatch: float = 0.0  # in place of the saved ones between B and W

    def __post_init__(self) -> None:
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if not (math.isfinite(value) and value >= 0):
                raise ScheduleError(f"a stage's {field_.name} is finite and >= 0: got {value}")
        if self.weight_s > self.backward_s:
            raise ScheduleError(
                f"weight_s is a part of backward_s: got {self.weight_s} of {self.backward_s}"
            )

    @classmethod
    def of(cls, prediction: StagePrediction) -> StageCost:
        """What a plan or a solved stage predicts."""
        p = prediction
        return cls(
            forward_s=p.forward_s,
            backward_s=p.backward_s,
            reduce_s=p.reduce_s,
            step_s=max(0.0, p.step_s - p.gather_s - p.reduce_s),
            rest_bytes=int(p.parameter_bytes + p.gradient_bytes + p.optimizer_bytes),
            saved_bytes_per_microbatch=int(p.saved_bytes),
            transient_bytes=int(p.transient_bytes),
            weight_s=min(p.weight_s, p.backward_s),
            gather_s=p.gather_s,
            held_bytes_per_microbatch=int(p.weight_bytes),
        )

    def seconds(self, kind: ActionKind, *, split: bool = False) -> float:
        """Of one action. split: backward is played in two actions."""
        match kind:
            case ActionKind.FORWARD:
                return self.forward_s
            case ActionKind.BACKWARD:
                return self.backward_s - self.weight_s if split else self.backward_s
            case ActionKind.WEIGHT:
                return self.weight_s
            case ActionKind.REDUCE:
                return self.reduce_s


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one stage sends to another for each microbatch, after its action of that phase."""

    source_stage: int
    target_stage: int
    phase: ActionKind  # FORWARD (to a later stage) or BACKWARD (to an earlier one)
    seconds: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ScheduleError(f"a transfer takes finite seconds >= 0: got {self.seconds}")
        step = self.target_stage - self.source_stage
        if step * {ActionKind.FORWARD: 1, ActionKind.BACKWARD: -1}.get(self.phase, 0) <= 0:
            raise ScheduleError(
                "a transfer goes to a later stage in FORWARD, to an earlier one in BACKWARD: got "
                f"{self.phase.name} {self.source_stage} -> {self.target_stage}"
            )


@dataclass(frozen=True, slots=True)
class Event:
    """One busy span of one stream. A transfer is an event of its source stage."""

    stage: int
    label: str  # "F0", "B0", "W0", "R", "gather", "step"
    start_s: float
    end_s: float
    stream: str  # COMPUTE_STREAM, COLLECTIVE_STREAM or link_stream(...)


@dataclass(frozen=True, slots=True)
class Timeline:
    """One simulated step. Tuples other than events have one entry per stage.

    exposed_s: seconds in which the worker's compute stream waits for communication for the stage,
    and for nothing else: a transfer on its way, a gather, a reduction. Collectives inside actions
    are not among them.
    """

    events: tuple[Event, ...]  # by start, then stage, then stream
    num_workers: int  # stage s belongs to worker s mod num_workers
    step_s: float
    bubble_fraction: float  # of the compute streams: 0 is always busy
    busy_s: tuple[float, ...]  # compute stream, once-per-step work included
    exposed_s: tuple[float, ...]
    memory: tuple[Series, ...]

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        return tuple(max(size for _, size in series) for series in self.memory)

    @property
    def worker_peak_bytes(self) -> tuple[float, ...]:
        """Per worker: what its stages hold together. As `peak_bytes` where each has one stage."""
        workers = [self.memory[w :: self.num_workers] for w in range(self.num_workers)]
        return tuple(max(size for _, size in _sum(series)) for series in workers)


def link_stream(source_stage: int, target_stage: int) -> str:
    """The name of the link stream from one stage to another."""
    return f"link {source_stage}->{target_stage}"


def simulate(
    schedule: Schedule,
    costs: Sequence[StageCost],
    transfers: Sequence[Transfer] = (),
    *,
    overlap: bool = False,
    overlap_slowdown: float = OVERLAP_SLOWDOWN,
) -> Timeline:
    """Play a schedule; costs has one entry per stage. O(S B + transfers B), plus a sort.

    Neighbouring stages depend on each other even when no transfer between them is listed (it then
    takes no time). overlap: once-per-step collectives run beside compute (see above). Raises
    ScheduleError for a schedule that :func:`check_schedule` refuses, for a wrong number of costs,
    for a transfer of a stage that does not exist, and for a slowdown below 1.
    """
    check_schedule(schedule)
    _check_inputs(schedule, costs, transfers)
    if not overlap_slowdown >= 1:
        raise ScheduleError(f"overlap_slowdown is a factor of at least 1: got {overlap_slowdown}")
    play = _Play(schedule, costs, transfers, overlap, overlap_slowdown)
    for cell in execution_order(schedule):
        play.action(schedule.actions[cell.worker][cell.position], cell.worker)
    play.finish()
    compute = [event for event in play.events if event.stream == COMPUTE_STREAM]
    step_s = max(event.end_s for event in play.events)
    busy = [0.0] * len(costs)
    for event in compute:
        busy[event.stage] += event.end_s - event.start_s
    idle = 1 - math.fsum(busy) / (schedule.num_workers * step_s) if step_s > 0 else 0.0
    return Timeline(
        events=tuple(sorted(play.events, key=lambda e: (e.start_s, e.stage, e.stream, e.end_s))),
        num_workers=schedule.num_workers,
        step_s=step_s,
        bubble_fraction=max(0.0, idle),
        busy_s=tuple(busy),
        exposed_s=tuple(play.exposed),
        memory=tuple(
            _memory(cost, [e for e in compute if e.stage == stage], schedule)
            for stage, cost in enumerate(costs)
        ),
    )


@dataclass(slots=True)
class _Play:
    """The streams while the schedule is played (a builder, local to one call). Streams are FIFO, so
    that one pass in any topological order gives every time."""

    schedule: Schedule
    costs: Sequence[StageCost]
    transfers: Sequence[Transfer]
    overlap: bool
    slowdown: float
    events: list[Event] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    free_s: list[float] = field(default_factory=list)  # compute stream of each worker
    spans: list[list[tuple[float, float]]] = field(default_factory=list)  # collectives, by worker
    gathered_s: list[float] = field(default_factory=list)  # by stage
    reduced_s: dict[int, float] = field(default_factory=dict)  # by stage
    link_s: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    end_s: dict[Action, float] = field(default_factory=dict)
    arrived_s: dict[Action, float] = field(default_factory=lambda: defaultdict(float))
    outgoing: dict[tuple[int, ActionKind], list[Transfer]] = field(
        default_factory=lambda: defaultdict(list)
    )
    last: set[Action] = field(default_factory=set)  # of each stage, among those with gradients

    def __post_init__(self) -> None:
        for transfer in self.transfers:
            self.outgoing[transfer.source_stage, transfer.phase].append(transfer)
        stages, workers = self.schedule.num_stages, self.schedule.num_workers
        self.exposed = [0.0] * stages
        self.gathered_s = [0.0] * stages
        self.free_s = [0.0] * workers
        self.spans = [[] for _ in range(workers)]
        for worker, row in enumerate(self.schedule.actions):
            for stage in self.schedule.stages_of(worker):
                self.gathered_s[stage] = self._collective(
                    worker, stage, GATHER_LABEL, 0.0, self.costs[stage].gather_s
                )
            if not self.overlap:  # the last gather ends last
                own = self.schedule.stages_of(worker)
                self.gathered_s[worker::workers] = [self.gathered_s[own[-1]]] * len(own)
                self.spans[worker].clear()
            makers = (ActionKind.BACKWARD, ActionKind.WEIGHT)
            self.last.update({a.stage: a for a in row if a.kind in makers}.values())

    def action(self, action: Action, worker: int) -> None:
        """Plays the next action of a worker's row. Pre: its prerequisites have been played."""
        stage, cost = action.stage, self.costs[action.stage]
        if action.kind is ActionKind.REDUCE and self.overlap:
            self.reduced_s[stage] = max(self.reduced_s[stage], self.free_s[worker])
            return
        needs = prerequisites(self.schedule.num_stages, action)
        begun = max([self.free_s[worker], *(self.end_s[need] for need in needs)])
        start = max(begun, self.arrived_s[action], self.gathered_s[stage])
        self.exposed[stage] += start - begun
        if action in self.last and self.overlap:
            self.reduced_s[stage] = self._collective(worker, stage, "R", start, cost.reduce_s)
        work = cost.seconds(action.kind, split=self.schedule.kind.splits_backward)
        end = _slowed_end(start, work, self.spans[worker], self.slowdown)
        self.free_s[worker] = self.end_s[action] = end
        self.events.append(Event(stage, str(action), start, end, COMPUTE_STREAM))
        if action.kind is ActionKind.REDUCE:
            self.exposed[stage] += end - start
            self.reduced_s[stage] = end
        for transfer in self.outgoing[stage, action.kind]:
            link = (stage, transfer.target_stage)
            sent = max(end, self.link_s[link])
            arrival = self.link_s[link] = sent + transfer.seconds
            received = Action(action.kind, transfer.target_stage, action.microbatch)
            self.arrived_s[received] = max(self.arrived_s[received], arrival)
            self.events.append(Event(stage, str(action), sent, arrival, link_stream(*link)))

    def finish(self) -> None:
        """What comes after each row: the optimizers of its stages, in the order of their R."""
        for worker, row in enumerate(self.schedule.actions):
            for action in row:
                if action.kind is ActionKind.REDUCE:
                    stage = action.stage
                    start = max(self.free_s[worker], self.reduced_s[stage])
                    self.exposed[stage] += start - self.free_s[worker]
                    end = self.free_s[worker] = start + self.costs[stage].step_s
                    if end > start:
                        self.events.append(Event(stage, STEP_LABEL, start, end, COMPUTE_STREAM))

    def _collective(
        self, worker: int, stage: int, label: str, ready: float, seconds: float
    ) -> float:
        """The end of a collective that is issued at `ready`."""
        busy = self.spans[worker]
        start = max(ready, busy[-1][1]) if busy else ready
        if seconds > 0:
            busy.append((start, start + seconds))
            stream = COLLECTIVE_STREAM if self.overlap else COMPUTE_STREAM
            self.events.append(Event(stage, label, start, start + seconds, stream))
        return start + seconds


def _slowed_end(
    start: float, work: float, spans: Sequence[tuple[float, float]], slowdown: float
) -> float:
    """When work that begins at `start` ends, at 1 / slowdown of its speed inside the spans."""
    at = start
    for begin, end in spans:
        if end <= at:
            continue
        free = max(0.0, begin - at)
        if work <= free:
            break
        at, work = at + free, work - free
        if work * slowdown <= end - at:
            return at + work * slowdown
        at, work = end, work - (end - at) / slowdown
    return at + work


def _memory(cost: StageCost, events: Sequence[Event], schedule: Schedule) -> Series:
    """events: of one stage's compute stream."""
    saved, held = cost.saved_bytes_per_microbatch, cost.held_bytes_per_microbatch
    after = held if schedule.kind.splits_backward else 0.0
    begins: Mapping[str, float] = {"F": saved}
    ends: Mapping[str, float] = {"B": after - saved, "W": -held}
    changes: defaultdict[float, float] = defaultdict(float)
    changes[0.0] = cost.rest_bytes
    for event in events:
        kind = event.label[:1]
        running = cost.transient_bytes if kind in _MICROBATCH_LETTERS else 0.0
        changes[event.start_s] += begins.get(kind, 0.0) + running
        changes[event.end_s] += ends.get(kind, 0.0) - running
    return _accumulated(changes)


def _accumulated(changes: Mapping[float, float]) -> Series:
    total, series = 0.0, []
    for time in sorted(changes):
        total += changes[time]
        series.append((time, total))
    return tuple(series)


def _sum(parts: Sequence[Series]) -> Series:
    changes: defaultdict[float, float] = defaultdict(float)
    for series in parts:
        before = 0.0
        for time, size in series:
            changes[time] += size - before
            before = size
    return _accumulated(changes)


def _check_inputs(
    schedule: Schedule, costs: Sequence[StageCost], transfers: Sequence[Transfer]
) -> None:
    if len(costs) != schedule.num_stages:
        raise ScheduleError(
            f"one cost per stage: got {len(costs)} for {schedule.num_stages} stages"
        )
    for transfer in transfers:
        for stage in (transfer.source_stage, transfer.target_stage):
            if not 0 <= stage < schedule.num_stages:
                raise ScheduleError(
                    f"{transfer} names a stage outside 0..{schedule.num_stages - 1}"
                )
