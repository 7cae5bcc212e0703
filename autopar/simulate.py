"""Event-driven simulation of a pipeline step: schedule + stage costs -> timeline, seconds, bytes.

Decides nothing: it plays a schedule. Each stage has one compute stream, which plays the stage's row
in order; each ordered pair of stages has one link stream, which plays their transfers first in,
first out and overlaps with compute. With r(a) the stages' prerequisites of an action a (see
``schedule``):
   start(a)    = max( end of the action before a in its row,  max over r(a) of end,
                      max over transfers into a of end )
   end(a)      = start(a) + forward_s | backward_s | reduce_s
   transfer    starts at max( end of its source action, end of the transfer before it on its link )
   step_s      = max over stages of (end of R + the stage's step_s)
   bubble      = 1 - sum_s busy_s / (S step_s)      stages count the same, whatever their devices
   peak_bytes  = rest + saved * max over time of the microbatches in flight + transient
All seconds and bytes are per device of a stage. Links do not contend with one another, and a
received value that waits for its action is counted in saved_bytes_per_microbatch, not apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from autopar.errors import ScheduleError
from autopar.schedule import (
    Action,
    ActionKind,
    Schedule,
    check_schedule,
    execution_order,
    in_flight,
    prerequisites,
)

COMPUTE_STREAM: Final = "compute"
STEP_LABEL: Final = "step"


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage costs, per device of the stage. All values are finite and not negative."""

    forward_s: float  # of one microbatch
    backward_s: float  # of one microbatch, recomputation included
    reduce_s: float = 0.0  # the action R: once per step
    step_s: float = 0.0  # other work once per step, after R, such as the optimizer
    rest_bytes: float = 0.0  # parameters, gradients, optimizer states
    saved_bytes_per_microbatch: float = 0.0
    transient_bytes: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ScheduleError(f"a stage's {field.name} is finite and >= 0: got {value}")

    def seconds(self, kind: ActionKind) -> float:
        """Of one action."""
        match kind:
            case ActionKind.FORWARD:
                return self.forward_s
            case ActionKind.BACKWARD:
                return self.backward_s
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
    label: str  # "F0", "B0", "R", "step"
    start_s: float
    end_s: float
    stream: str  # COMPUTE_STREAM or link_stream(...)


@dataclass(frozen=True, slots=True)
class Timeline:
    """One simulated step. Tuples other than events have one entry per stage."""

    events: tuple[Event, ...]  # by start, then stage, then stream
    step_s: float
    bubble_fraction: float  # of the compute streams: 0 is always busy
    busy_s: tuple[float, ...]  # compute stream, once-per-step work included
    peak_bytes: tuple[float, ...]


def link_stream(source_stage: int, target_stage: int) -> str:
    """The name of the link stream from one stage to another."""
    return f"link {source_stage}->{target_stage}"


def simulate(
    schedule: Schedule, costs: Sequence[StageCost], transfers: Sequence[Transfer] = ()
) -> Timeline:
    """Play a schedule; costs has one entry per stage. O(S B + transfers B), plus a sort.

    Neighbouring stages depend on each other even when no transfer between them is listed (it then
    takes no time). Raises ScheduleError for a schedule that :func:`check_schedule` refuses, for a
    wrong number of costs, and for a transfer of a stage that does not exist.
    """
    check_schedule(schedule)
    _check_inputs(schedule, costs, transfers)
    events = [*_play(schedule, costs, transfers)]
    for stage, cost in enumerate(costs):
        if cost.step_s > 0:
            start_s = max(e.end_s for e in events if e.stage == stage and _is_compute(e))
            end_s = start_s + cost.step_s
            events.append(Event(stage, STEP_LABEL, start_s, end_s, COMPUTE_STREAM))
    num_microbatches = schedule.num_microbatches
    busy_s = tuple(
        num_microbatches * (cost.forward_s + cost.backward_s) + cost.reduce_s + cost.step_s
        for cost in costs
    )
    step_s = max(event.end_s for event in events if _is_compute(event))
    return Timeline(
        events=tuple(sorted(events, key=lambda e: (e.start_s, e.stage, e.stream, e.end_s))),
        step_s=step_s,
        bubble_fraction=max(0.0, 1 - sum(busy_s) / (len(costs) * step_s)) if step_s > 0 else 0.0,
        busy_s=busy_s,
        peak_bytes=tuple(
            cost.rest_bytes + cost.saved_bytes_per_microbatch * count + cost.transient_bytes
            for cost, count in zip(costs, in_flight(schedule), strict=True)
        ),
    )


def _play(
    schedule: Schedule, costs: Sequence[StageCost], transfers: Sequence[Transfer]
) -> list[Event]:
    """Streams are FIFO, so one pass in any topological order gives every time."""
    outgoing: defaultdict[tuple[int, ActionKind], list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        outgoing[transfer.source_stage, transfer.phase].append(transfer)
    events: list[Event] = []
    stream_free_s: defaultdict[tuple[int, int], float] = defaultdict(float)  # (s, s) is compute
    end_s: dict[tuple[int, Action], float] = {}
    arrived_s: defaultdict[tuple[int, Action], float] = defaultdict(float)
    for cell in execution_order(schedule):
        stage, action = cell.stage, schedule.actions[cell.stage][cell.position]
        needs = prerequisites(schedule.num_stages, stage, action)
        ready = [stream_free_s[stage, stage], arrived_s[stage, action], *(end_s[n] for n in needs)]
        start = max(ready)
        end = start + costs[stage].seconds(action.kind)
        stream_free_s[stage, stage] = end_s[stage, action] = end
        events.append(Event(stage, str(action), start, end, COMPUTE_STREAM))
        for transfer in outgoing[stage, action.kind]:
            target = transfer.target_stage
            sent = max(end, stream_free_s[stage, target])
            arrival = stream_free_s[stage, target] = sent + transfer.seconds
            arrived_s[target, action] = max(arrived_s[target, action], arrival)
            events.append(Event(stage, str(action), sent, arrival, link_stream(stage, target)))
    return events


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


def _is_compute(event: Event) -> bool:
    return event.stream == COMPUTE_STREAM
