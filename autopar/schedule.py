"""Pipeline schedules as data: who computes which microbatch, in which order.

Decides the order of the actions of each worker. A worker is the device group that plays one row:
one stage, or, in the interleaved family, all stages s with s mod p = worker, p workers in all.
Inputs: the schedule's kind, the number of stages S, of microbatches B and of workers p. Output: a
:class:`Schedule`, a grid of actions that can be printed, parsed and proved before any GPU is
touched. All ranks of a worker play the same row.

Semantics, shared by the checker, the simulator and the executor:
   a row is played in order, one action at a time;
   a send never blocks, a receive blocks until the value has been sent;
   an action starts when those it needs have ended (`actions.prerequisites`).
A skip edge from stage r < s-1 adds no order: F(m) of s-1 already waits for F(m) of r, by induction
on s-1, s-2, ..., r. The transfers from one stage to another are one FIFO channel per ordered pair
of stages, so microbatches must come in one order for all stages, per direction. R of a stage may
wait for gradients of weights that later stages have borrowed: a row reduces later stages first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from autopar.actions import Action, ActionKind, Row, prerequisites
from autopar.errors import ScheduleError


class ScheduleKind(StrEnum):
    """A family of schedules. A new one is a member here and a row in ``_FAMILIES``."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"

    @property
    def splits_backward(self) -> bool:
        """Whether backward is played in two actions, B and W."""
        return _FAMILIES[self].splits_backward

    @property
    def shares_devices(self) -> bool:
        """Whether a worker may play several stages."""
        return _FAMILIES[self].shares_devices


@dataclass(frozen=True, slots=True)
class Cell:
    """A place in the grid: the position-th action of a worker."""

    worker: int
    position: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """A grid of actions. Its shape is checked at birth, its meaning by :func:`check_schedule`."""

    kind: ScheduleKind
    num_stages: int
    num_microbatches: int
    actions: tuple[Row, ...]  # actions[worker][position]

    def __post_init__(self) -> None:
        _check_counts(self.kind, self.num_stages, self.num_microbatches, len(self.actions))

    @property
    def num_workers(self) -> int:
        return len(self.actions)

    def stages_of(self, worker: int) -> tuple[int, ...]:
        """The stages that a worker plays, in order."""
        return tuple(range(worker, self.num_stages, self.num_workers))

    def __str__(self) -> str:
        return _grid_text(self)

    @classmethod
    def parse(cls, text: str, *, kind: ScheduleKind) -> Schedule:
        """The inverse of ``str``. The text has no kind, so it is given; the grid is not checked."""
        rows: list[Row] = []
        for line in text.strip().splitlines():
            name, colon, cells = line.strip().partition(":")
            if not colon or name not in (f"stage{len(rows)}", f"worker{len(rows)}"):
                raise ScheduleError(f"expected a row 'stage{len(rows)}: ...', got {line!r}")
            rows.append(tuple(Action.parse(cell, len(rows)) for cell in cells.split()))
        actions = [action for row in rows for action in row]
        microbatches = {a.microbatch for a in actions if a.microbatch is not None}
        num_stages = max([len(rows), *(a.stage + 1 for a in actions)])
        return cls(kind, num_stages, max(microbatches, default=-1) + 1, tuple(rows))


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., NeurIPS 2019). In flight: B."""
    return build_schedule(ScheduleKind.GPIPE, num_stages, num_microbatches)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """One forward, one backward, after a warm-up of as many forwards as there are later stages
    (PipeDream-Flush: Narayanan et al., ICML 2021). In flight: min(B, stages from the end)."""
    return build_schedule(ScheduleKind.ONE_F_ONE_B, num_stages, num_microbatches)


def interleaved(num_stages: int, num_microbatches: int, num_workers: int) -> Schedule:
    """1F1B over v = S / p stages per worker, microbatches in groups of p (Narayanan et al., SC'21,
    2.2). The bubble is 1/v of 1F1B's. B is a multiple of p; with v = 1 it is 1F1B for any B."""
    return build_schedule(ScheduleKind.INTERLEAVED, num_stages, num_microbatches, num_workers)


def zb_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B whose stage s plays W s microbatches after B, so that W fills the bubble (ZB-H1: Qi et
    al., ICLR 2024). In flight until W: min(B, S) on every stage, the most that 1F1B has."""
    return build_schedule(ScheduleKind.ZB_H1, num_stages, num_microbatches)


def build_schedule(
    kind: ScheduleKind, num_stages: int, num_microbatches: int, num_workers: int | None = None
) -> Schedule:
    """The schedule of a kind, already proved by :func:`check_schedule`. num_workers: one per stage
    by default. O(S B)."""
    workers = num_stages if num_workers is None else num_workers
    rows = schedule_rows(kind, num_stages, num_microbatches, workers)
    schedule = Schedule(kind, num_stages, num_microbatches, rows)
    check_schedule(schedule)
    return schedule


def schedule_rows(
    kind: ScheduleKind, num_stages: int, num_microbatches: int, num_workers: int
) -> tuple[Row, ...]:
    """Of that schedule, not proved again. O(S B)."""
    _check_counts(kind, num_stages, num_microbatches, num_workers)
    return _FAMILIES[kind].rows(num_stages, num_microbatches, num_workers)


def _check_counts(
    kind: ScheduleKind, num_stages: int, num_microbatches: int, num_workers: int
) -> None:
    if num_stages < 1 or num_microbatches < 1:
        raise ScheduleError(
            "a schedule has at least one stage and one microbatch: got "
            f"num_stages={num_stages} num_microbatches={num_microbatches}"
        )
    if num_workers != num_stages and not kind.shares_devices:
        raise ScheduleError(
            f"one row per stage in a {kind} schedule: got {num_workers} rows for {num_stages} "
            "stages; in an interleaved one a worker plays several stages"
        )
    if num_workers < 1 or num_stages % num_workers:
        raise ScheduleError(
            f"every worker plays as many stages: got {num_stages} stages on {num_workers} workers"
        )


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per stage, the most microbatches between the start of their F and the end of their last
    action: B, or W where backward is split."""
    last = ActionKind.WEIGHT if schedule.kind.splits_backward else ActionKind.BACKWARD
    now, peaks = [0] * schedule.num_stages, [0] * schedule.num_stages
    for row in schedule.actions:
        for action in row:
            if action.kind is ActionKind.FORWARD:
                now[action.stage] += 1
            elif action.kind is last:
                now[action.stage] -= 1
            peaks[action.stage] = max(peaks[action.stage], now[action.stage])
    return tuple(peaks)


def in_flight_count(
    kind: ScheduleKind,
    stages_from_end: int,
    num_microbatches: int,
    *,
    num_stages: int | None = None,
    num_workers: int | None = None,
) -> int:
    """``in_flight(schedule)[-stages_from_end]``, the last stage being 1, without the schedule.

    num_stages: not needed for gpipe and 1f1b. Where another family is not told, the answer is B,
    which bounds any. num_workers: one per stage by default. The stages of one worker need not reach
    their counts at one time, so their sum bounds what the worker holds. O(1), interleaved O(B S/p).
    """
    if stages_from_end < 1 or num_microbatches < 1:
        raise ScheduleError(
            "stages count from 1 at the end, and there is at least one microbatch: got "
            f"stages_from_end={stages_from_end} num_microbatches={num_microbatches}"
        )
    if num_stages is None:
        if kind not in (ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B):
            return num_microbatches
        num_stages = stages_from_end
    if stages_from_end > num_stages:
        raise ScheduleError(f"stage {stages_from_end} from the end of only {num_stages} stages")
    workers = num_stages if num_workers is None else num_workers
    _check_counts(kind, num_stages, num_microbatches, workers)
    place = _Place(num_stages - stages_from_end, num_stages, num_microbatches, workers)
    return _FAMILIES[kind].in_flight(place)


def check_schedule(schedule: Schedule) -> None:
    """Prove completeness, order and freedom from deadlock. O(S B).

    Raises ScheduleError with the grid and the bad cell in brackets. Proved:
       completeness    each stage plays F and B (and W, where backward is split) of each microbatch
                       once, and one R, last, those of a row's later stages first
       order           F(m) before B(m) before W(m); one order of microbatches for all stages, per
                       direction
       no deadlock     a topological order of all cells exists
    """
    for worker in range(schedule.num_workers):
        _check_row(schedule, worker)
    for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
        _check_fifo(schedule, kind)
    execution_order(schedule)


def execution_order(schedule: Schedule) -> tuple[Cell, ...]:
    """All cells in an order in which they can be played; ScheduleError on deadlock. O(S B)."""
    workers = schedule.num_workers
    done: set[Action] = set()
    order: list[Cell] = []
    position = [0] * workers
    awake = deque(range(workers))
    while awake:
        worker = awake.popleft()
        row, first = schedule.actions[worker], position[worker]
        while position[worker] < len(row) and done.issuperset(
            prerequisites(schedule.num_stages, row[position[worker]])
        ):
            done.add(row[position[worker]])
            order.append(Cell(worker, position[worker]))
            position[worker] += 1
        if position[worker] > first:
            awake.extend({(worker - 1) % workers, (worker + 1) % workers} - {worker})
    _check_all_played(schedule, position, done)
    return tuple(order)


def _check_all_played(schedule: Schedule, position: list[int], done: set[Action]) -> None:
    waits = []
    stuck = [w for w, row in enumerate(schedule.actions) if position[w] < len(row)]
    for worker in stuck:
        action = schedule.actions[worker][position[worker]]
        need = next(n for n in prerequisites(schedule.num_stages, action) if n not in done)
        waits.append(f"stage{action.stage} at {action} for {need} of stage{need.stage}")
    if stuck:
        raise _bad_cell(
            schedule,
            Cell(stuck[0], position[stuck[0]]),
            f"deadlock: waiting are {'; '.join(waits)}",
        )


def _check_row(schedule: Schedule, worker: int) -> None:
    row, own, seen = schedule.actions[worker], schedule.stages_of(worker), set[Action]()
    kinds = [ActionKind.FORWARD, ActionKind.BACKWARD]
    kinds += [ActionKind.WEIGHT] if schedule.kind.splits_backward else []
    reduced: int | None = None  # stage of the R before
    for position, action in enumerate(row):
        cell, stage, microbatch = Cell(worker, position), action.stage, action.microbatch
        if stage not in own:
            raise _bad_cell(schedule, cell, f"stage{stage} is played by another row")
        if action in seen:
            raise _bad_cell(schedule, cell, f"stage{stage} plays {action} twice")
        if microbatch is not None and microbatch >= schedule.num_microbatches:
            raise _bad_cell(
                schedule, cell, f"{action} of only {schedule.num_microbatches} microbatches"
            )
        if microbatch is not None and action.kind not in kinds:
            raise _bad_cell(schedule, cell, f"{action}: B plays all of backward here")
        for need in prerequisites(schedule.num_stages, action):
            if need.stage == stage and need not in seen:
                raise _bad_cell(schedule, cell, f"stage{stage} plays {action} before {need}")
        if reduced is not None and not (microbatch is None and stage < reduced):
            raise _bad_cell(schedule, cell, "R comes last, that of a later stage first")
        reduced = stage if microbatch is None else None
        seen.add(action)
    wanted = [Action(k, s, m) for s in own for k in kinds for m in range(schedule.num_microbatches)]
    wanted += [Action(ActionKind.REDUCE, stage) for stage in own]
    for action in wanted:
        if action not in seen:
            missing = f"stage{action.stage} lacks {action}"
            raise _bad_cell(schedule, Cell(worker, len(row)), missing)


def _check_fifo(schedule: Schedule, kind: ActionKind) -> None:
    first = [a for a in schedule.actions[0] if a.kind is kind and a.stage == 0]
    for worker, row in enumerate(schedule.actions):
        place = dict.fromkeys(schedule.stages_of(worker), 0)
        for position, action in enumerate(row):
            if action.kind is kind:
                expected = first[place[action.stage]]
                place[action.stage] += 1
                if action.microbatch != expected.microbatch:
                    raise _bad_cell(
                        schedule,
                        Cell(worker, position),
                        f"channels are FIFO: stage0 plays {expected} where this is {action}",
                    )


def _bad_cell(schedule: Schedule, bad: Cell, reason: str) -> ScheduleError:
    return ScheduleError(f"{schedule.kind} schedule: {reason}\n{_grid_text(schedule, bad)}")


def _grid_text(schedule: Schedule, marked: Cell | None = None) -> str:
    """One row per line; actions name their stage where a worker has several. marked: in brackets,
    also behind a row's end."""
    shared = schedule.num_workers < schedule.num_stages
    lines = []
    for worker, row in enumerate(schedule.actions):
        texts = [f"{action.stage}{action}" if shared else str(action) for action in row]
        if marked is not None and worker == marked.worker:
            at = marked.position
            texts[at:] = [f"[{''.join(texts[at : at + 1])}]", *texts[at + 1 :]]
        lines.append(f"{'worker' if shared else 'stage'}{worker}: {' '.join(texts)}")
    return "\n".join(lines)


def _gpipe_rows(num_stages: int, num_microbatches: int, _: int) -> tuple[Row, ...]:
    rows = []
    for stage in range(num_stages):
        forwards, backwards = _directions(stage, num_microbatches)
        rows.append((*forwards, *backwards, Action(ActionKind.REDUCE, stage)))
    return tuple(rows)


def _one_f_one_b_rows(num_stages: int, num_microbatches: int, _: int) -> tuple[Row, ...]:
    rows = []
    for stage in range(num_stages):
        actions = _alternate(*_directions(stage, num_microbatches), warmup=num_stages - 1 - stage)
        rows.append((*actions, Action(ActionKind.REDUCE, stage)))
    return tuple(rows)


def _interleaved_rows(num_stages: int, num_microbatches: int, num_workers: int) -> tuple[Row, ...]:
    if num_stages == num_workers:
        return _one_f_one_b_rows(num_stages, num_microbatches, num_workers)
    if num_microbatches % num_workers:
        raise ScheduleError(
            f"an interleaved schedule of {num_workers} workers with several stages each takes a "
            f"multiple of {num_workers} microbatches: got {num_microbatches}. Use such a number, "
            "or the 1f1b schedule"
        )
    return tuple(
        _interleaved_row(worker, num_stages, num_microbatches, num_workers)
        for worker in range(num_workers)
    )


def _interleaved_row(worker: int, num_stages: int, num_microbatches: int, num_workers: int) -> Row:
    """p microbatches through one stage after the other, then the next p. The warm-up lets the first
    microbatch reach the last stage, and two more forwards per later worker hide the way there and
    back (Megatron-LM)."""
    own = range(worker, num_stages, num_workers)
    groups = [range(m, m + num_workers) for m in range(0, num_microbatches, num_workers)]
    forward, backward = ActionKind.FORWARD, ActionKind.BACKWARD
    forwards = [Action(forward, s, m) for group in groups for s in own for m in group]
    backwards = [Action(backward, s, m) for group in groups for s in reversed(own) for m in group]
    warmup = 2 * (num_workers - 1 - worker) + (len(own) - 1) * num_workers
    reduces = [Action(ActionKind.REDUCE, stage) for stage in reversed(own)]
    return (*_alternate(forwards, backwards, warmup), *reduces)


def _zb_h1_rows(num_stages: int, num_microbatches: int, num_workers: int) -> tuple[Row, ...]:
    """W(m) follows B(m + stage): with W's of as many microbatches as there are earlier stages to
    play, a stage sends its last B that much earlier."""
    rows = []
    for stage, plain in enumerate(_one_f_one_b_rows(num_stages, num_microbatches, num_workers)):
        weights = deque(Action(ActionKind.WEIGHT, stage, m) for m in range(num_microbatches))
        row: list[Action] = []
        for action in plain:
            if action.kind is ActionKind.REDUCE:
                row += weights
            row.append(action)
            if action.kind is ActionKind.BACKWARD and (action.microbatch or 0) >= stage:
                row.append(weights.popleft())
        rows.append(tuple(row))
    return tuple(rows)


def _directions(stage: int, num_microbatches: int) -> tuple[Row, Row]:
    forwards = tuple(Action(ActionKind.FORWARD, stage, m) for m in range(num_microbatches))
    return forwards, tuple(Action(ActionKind.BACKWARD, stage, m) for m in range(num_microbatches))


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> Row:
    """The warm-up's forwards; forward and backward in turns; the backwards that are left."""
    warmup = min(warmup, len(forwards))
    pairs = zip(forwards[warmup:], backwards, strict=False)
    steady = [action for pair in pairs for action in pair]
    return (*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :])


@dataclass(frozen=True, slots=True)
class _Place:
    """A stage of a pipeline."""

    stage: int
    num_stages: int
    num_microbatches: int
    num_workers: int


def _interleaved_in_flight(place: _Place) -> int:
    if place.num_stages == place.num_workers:
        return min(place.num_microbatches, place.num_stages - place.stage)
    counts = _interleaved_counts(place.num_stages, place.num_microbatches, place.num_workers)
    return counts[place.stage]


@lru_cache(maxsize=4)  # asked for stage by stage
def _interleaved_counts(stages: int, count: int, workers: int) -> tuple[int, ...]:
    rows = _interleaved_rows(stages, count, workers)
    return in_flight(Schedule(ScheduleKind.INTERLEAVED, stages, count, rows))


@dataclass(frozen=True, slots=True)
class _Family:
    rows: Callable[[int, int, int], tuple[Row, ...]]  # (stages, microbatches, workers)
    in_flight: Callable[[_Place], int]
    splits_backward: bool = False
    shares_devices: bool = False


_FAMILIES: Final[Mapping[ScheduleKind, _Family]] = MappingProxyType(
    {
        ScheduleKind.GPIPE: _Family(_gpipe_rows, lambda p: p.num_microbatches),
        ScheduleKind.ONE_F_ONE_B: _Family(
            _one_f_one_b_rows, lambda p: min(p.num_microbatches, p.num_stages - p.stage)
        ),
        ScheduleKind.INTERLEAVED: _Family(
            _interleaved_rows, _interleaved_in_flight, shares_devices=True
        ),
        ScheduleKind.ZB_H1: _Family(
            _zb_h1_rows, lambda p: min(p.num_microbatches, p.num_stages), splits_backward=True
        ),
    }
)
