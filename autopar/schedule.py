"""Pipeline schedules as data: who computes which microbatch, in which order.

Decides the order of the actions of each stage. Inputs: the schedule's kind, the number of stages S
and of microbatches B. Output: a :class:`Schedule`, a grid of actions that can be printed, parsed
and proved before any GPU is touched. One row per stage: all ranks of a stage play the same row.

Semantics, shared by the checker, the simulator and the executor:
   a row is played in order, one action at a time;
   a send never blocks, a receive blocks until the value has been sent;
   F(m) of stage s needs F(m) of stage s-1,  B(m) of stage s needs B(m) of stage s+1 and F(m) of s.
A skip edge from stage r < s-1 adds no order: F(m) of s-1 already waits for F(m) of r, by induction
on s-1, s-2, ..., r. The transfers from one stage to another are one FIFO channel per ordered pair
of stages, so microbatches must come in one order in all rows, per direction.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from autopar.errors import ScheduleError


class ActionKind(StrEnum):
    """What one action does; the value is its letter in the text form."""

    FORWARD = "F"
    BACKWARD = "B"
    REDUCE = "R"  # gradients, once per step, after the last backward


class ScheduleKind(StrEnum):
    """A family of schedules. A new one is a member here and a row in ``_FAMILIES``."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a stage's row. microbatch is None for REDUCE, and only for it."""

    kind: ActionKind
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if (self.kind is ActionKind.REDUCE) != (self.microbatch is None):
            raise ScheduleError(
                f"F and B name a microbatch, R does not: got {self.kind.name} of {self.microbatch}"
            )
        if self.microbatch is not None and self.microbatch < 0:
            raise ScheduleError(f"microbatches count from 0: got {self.microbatch}")

    def __str__(self) -> str:
        return str(self.kind) if self.microbatch is None else f"{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The inverse of ``str``: "F0", "B12", "R"."""
        match = re.fullmatch(r"([FB])(\d+)|R", text)
        if match is None:
            raise ScheduleError(f"an action is F<microbatch>, B<microbatch> or R: got {text!r}")
        return REDUCE if text == "R" else cls(ActionKind(match[1]), int(match[2]))


REDUCE: Final = Action(ActionKind.REDUCE)
Row = tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A place in the grid: the position-th action of a stage."""

    stage: int
    position: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """A grid of actions. Its shape is checked at birth, its meaning by :func:`check_schedule`."""

    kind: ScheduleKind
    num_stages: int
    num_microbatches: int
    actions: tuple[Row, ...]  # actions[stage][position]

    def __post_init__(self) -> None:
        if self.num_stages < 1 or self.num_microbatches < 1:
            raise ScheduleError(
                "a schedule has at least one stage and one microbatch: got "
                f"num_stages={self.num_stages} num_microbatches={self.num_microbatches}"
            )
        if len(self.actions) != self.num_stages:
            raise ScheduleError(
                f"one row per stage: got {len(self.actions)} rows for {self.num_stages} stages"
            )

    def __str__(self) -> str:
        return "\n".join(
            f"stage{stage}: {' '.join(map(str, row))}" for stage, row in enumerate(self.actions)
        )

    @classmethod
    def parse(cls, text: str, *, kind: ScheduleKind) -> Schedule:
        """The inverse of ``str``. The text has no kind, so it is given; the grid is not checked."""
        rows: list[Row] = []
        for line in text.strip().splitlines():
            name, colon, cells = line.strip().partition(":")
            if not colon or name != f"stage{len(rows)}":
                raise ScheduleError(f"expected a row 'stage{len(rows)}: ...', got {line!r}")
            rows.append(tuple(map(Action.parse, cells.split())))
        microbatches = {a.microbatch for row in rows for a in row if a.microbatch is not None}
        return cls(kind, len(rows), max(microbatches, default=-1) + 1, tuple(rows))


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., NeurIPS 2019). In flight: B."""
    return build_schedule(ScheduleKind.GPIPE, num_stages, num_microbatches)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """One forward, one backward, after a warm-up of as many forwards as there are later stages
    (PipeDream-Flush: Narayanan et al., ICML 2021). In flight: min(B, stages from the end)."""
    return build_schedule(ScheduleKind.ONE_F_ONE_B, num_stages, num_microbatches)


def build_schedule(kind: ScheduleKind, num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of a kind, already proved by :func:`check_schedule`. O(S B)."""
    rows = _FAMILIES[kind].rows(num_stages, num_microbatches)
    schedule = Schedule(kind, num_stages, num_microbatches, rows)
    check_schedule(schedule)
    return schedule


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per stage, the most microbatches between the start of their F and the end of their B."""
    change = {ActionKind.FORWARD: 1, ActionKind.BACKWARD: -1, ActionKind.REDUCE: 0}
    peaks = []
    for row in schedule.actions:
        now = peak = 0
        for action in row:
            now += change[action.kind]
            peak = max(peak, now)
        peaks.append(peak)
    return tuple(peaks)


def in_flight_count(kind: ScheduleKind, stages_from_end: int, num_microbatches: int) -> int:
    """``in_flight(schedule)[-stages_from_end]``, the last stage being 1, in O(1)."""
    if stages_from_end < 1 or num_microbatches < 1:
        raise ScheduleError(
            "stages count from 1 at the end, and there is at least one microbatch: got "
            f"stages_from_end={stages_from_end} num_microbatches={num_microbatches}"
        )
    return _FAMILIES[kind].in_flight(stages_from_end, num_microbatches)


def prerequisites(num_stages: int, stage: int, action: Action) -> tuple[tuple[int, Action], ...]:
    """The (stage, action) pairs that must have ended before an action of a stage may start."""
    if action.kind is ActionKind.FORWARD:
        return ((stage - 1, action),) if stage > 0 else ()
    if action.kind is ActionKind.BACKWARD:
        own = (stage, Action(ActionKind.FORWARD, action.microbatch))
        return (own, (stage + 1, action)) if stage < num_stages - 1 else (own,)
    return ()


def check_schedule(schedule: Schedule) -> None:
    """Prove completeness, order and freedom from deadlock. O(S B).

    Raises ScheduleError with the grid and the bad cell in brackets. Proved:
       completeness    each stage plays F and B of each microbatch once, and one R, last
       order           F(m) before B(m); one order of microbatches for all stages, per direction
       no deadlock     a topological order of all cells exists
    """
    for stage in range(schedule.num_stages):
        _check_row(schedule, stage)
    for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
        _check_fifo(schedule, kind)
    execution_order(schedule)


def execution_order(schedule: Schedule) -> tuple[Cell, ...]:
    """All cells in an order in which they can be played; ScheduleError on deadlock. O(S B)."""
    done: set[tuple[int, Action]] = set()
    order: list[Cell] = []
    position = [0] * schedule.num_stages
    awake = deque(range(schedule.num_stages))
    while awake:
        stage = awake.popleft()
        row, first = schedule.actions[stage], position[stage]
        while position[stage] < len(row) and done.issuperset(
            prerequisites(schedule.num_stages, stage, row[position[stage]])
        ):
            done.add((stage, row[position[stage]]))
            order.append(Cell(stage, position[stage]))
            position[stage] += 1
        if position[stage] > first:
            awake.extend({max(stage - 1, 0), min(stage + 1, schedule.num_stages - 1)} - {stage})
    _check_all_played(schedule, position, done)
    return tuple(order)


def _check_all_played(
    schedule: Schedule, position: list[int], done: set[tuple[int, Action]]
) -> None:
    waits = []
    stuck = [s for s, row in enumerate(schedule.actions) if position[s] < len(row)]
    for stage in stuck:
        action = schedule.actions[stage][position[stage]]
        needs = [n for n in prerequisites(schedule.num_stages, stage, action) if n not in done]
        waits.append(f"stage{stage} at {action} for {needs[0][1]} of stage{needs[0][0]}")
    if stuck:
        raise _bad_cell(
            schedule,
            Cell(stuck[0], position[stuck[0]]),
            f"deadlock: waiting are {'; '.join(waits)}",
        )


def _check_row(schedule: Schedule, stage: int) -> None:
    row, seen = schedule.actions[stage], set[Action]()
    for position, action in enumerate(row):
        cell, microbatch = Cell(stage, position), action.microbatch
        if action in seen:
            raise _bad_cell(schedule, cell, f"stage{stage} plays {action} twice")
        if microbatch is not None and microbatch >= schedule.num_microbatches:
            raise _bad_cell(
                schedule, cell, f"{action} of only {schedule.num_microbatches} microbatches"
            )
        forward = Action(ActionKind.FORWARD, microbatch or 0)
        if action.kind is ActionKind.BACKWARD and forward not in seen:
            raise _bad_cell(schedule, cell, f"stage{stage} plays {action} before {forward}")
        if action.kind is ActionKind.REDUCE and position != len(row) - 1:
            raise _bad_cell(schedule, cell, "R comes last, after every backward")
        seen.add(action)
    for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
        for microbatch in range(schedule.num_microbatches):
            if (action := Action(kind, microbatch)) not in seen:
                raise _bad_cell(schedule, Cell(stage, len(row)), f"stage{stage} lacks {action}")
    if REDUCE not in seen:
        raise _bad_cell(schedule, Cell(stage, len(row)), f"stage{stage} lacks R")


def _check_fifo(schedule: Schedule, kind: ActionKind) -> None:
    first = [action for action in schedule.actions[0] if action.kind is kind]
    for stage, row in enumerate(schedule.actions):
        cells = [(Cell(stage, p), action) for p, action in enumerate(row) if action.kind is kind]
        for (cell, action), expected in zip(cells, first, strict=True):
            if action != expected:
                raise _bad_cell(
                    schedule,
                    cell,
                    f"channels are FIFO: stage0 plays {expected} where this is {action}",
                )


def _bad_cell(schedule: Schedule, bad: Cell, reason: str) -> ScheduleError:
    lines = []
    for stage, row in enumerate(schedule.actions):
        texts = [str(action) for action in row]
        if stage == bad.stage:
            texts[bad.position :] = [
                f"[{''.join(texts[bad.position : bad.position + 1])}]",
                *texts[bad.position + 1 :],
            ]
        lines.append(f"stage{stage}: {' '.join(texts)}")
    return ScheduleError("\n".join([f"{schedule.kind} schedule: {reason}", *lines]))


def _gpipe_rows(num_stages: int, num_microbatches: int) -> tuple[Row, ...]:
    forwards, backwards = _directions(num_microbatches)
    return ((*forwards, *backwards, REDUCE),) * num_stages


def _one_f_one_b_rows(num_stages: int, num_microbatches: int) -> tuple[Row, ...]:
    forwards, backwards = _directions(num_microbatches)
    rows = []
    for stage in range(num_stages):
        warmup = min(num_microbatches, num_stages - 1 - stage)
        steady = [
            action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair
        ]
        cooldown = backwards[num_microbatches - warmup :]
        rows.append((*forwards[:warmup], *steady, *cooldown, REDUCE))
    return tuple(rows)


def _directions(num_microbatches: int) -> tuple[Row, Row]:
    forwards = tuple(Action(ActionKind.FORWARD, m) for m in range(num_microbatches))
    return forwards, tuple(Action(ActionKind.BACKWARD, m) for m in range(num_microbatches))


@dataclass(frozen=True, slots=True)
class _Family:
    rows: Callable[[int, int], tuple[Row, ...]]  # (num_stages, num_microbatches)
    in_flight: Callable[[int, int], int]  # (stages_from_end, num_microbatches)


_FAMILIES: Final[Mapping[ScheduleKind, _Family]] = MappingProxyType(
    {
        ScheduleKind.GPIPE: _Family(_gpipe_rows, lambda _, num_microbatches: num_microbatches),
        ScheduleKind.ONE_F_ONE_B: _Family(_one_f_one_b_rows, min),
    }
)
