"""Schedules: golden text, proofs, and the counts that the memory model uses."""

from __future__ import annotations

import pytest

from autopar.errors import ScheduleError
from autopar.schedule import (
    REDUCE,
    Action,
    ActionKind,
    Cell,
    Schedule,
    ScheduleKind,
    build_schedule,
    check_schedule,
    execution_order,
    gpipe,
    in_flight,
    in_flight_count,
    one_f_one_b,
    prerequisites,
)

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 2), (3, 8), (4, 2), (5, 5), (8, 16)]


def parsed(text: str) -> Schedule:
    return Schedule.parse(text, kind=ScheduleKind.GPIPE)


def test_one_f_one_b_text() -> None:
    schedule = one_f_one_b(num_stages=2, num_microbatches=2)
    assert str(schedule) == "stage0: F0 F1 B0 B1 R\nstage1: F0 B0 F1 B1 R"


def test_one_f_one_b_text_of_three_stages() -> None:
    assert str(one_f_one_b(num_stages=3, num_microbatches=4)) == (
        "stage0: F0 F1 F2 B0 F3 B1 B2 B3 R\n"
        "stage1: F0 F1 B0 F2 B1 F3 B2 B3 R\n"
        "stage2: F0 B0 F1 B1 F2 B2 F3 B3 R"
    )


def test_gpipe_text() -> None:
    assert str(gpipe(2, 2)) == "stage0: F0 F1 B0 B1 R\nstage1: F0 F1 B0 B1 R"


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_every_family_is_provable_and_parseable(
    kind: ScheduleKind, num_stages: int, num_microbatches: int
) -> None:
    schedule = build_schedule(kind, num_stages, num_microbatches)
    check_schedule(schedule)
    assert Schedule.parse(str(schedule), kind=kind) == schedule


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_in_flight_closed_form(kind: ScheduleKind, num_stages: int, num_microbatches: int) -> None:
    schedule = build_schedule(kind, num_stages, num_microbatches)
    closed = [in_flight_count(kind, num_stages - s, num_microbatches) for s in range(num_stages)]
    assert in_flight(schedule) == tuple(closed)


def test_in_flight_values() -> None:
    assert in_flight(one_f_one_b(4, 3)) == (3, 3, 2, 1)
    assert in_flight(gpipe(2, 3)) == (3, 3)
    with pytest.raises(ScheduleError, match="stages count from 1"):
        in_flight_count(ScheduleKind.GPIPE, 0, 1)


def test_execution_order_respects_prerequisites() -> None:
    schedule = one_f_one_b(4, 6)
    order = execution_order(schedule)
    done: set[tuple[int, Action]] = set()
    for cell in order:
        action = schedule.actions[cell.stage][cell.position]
        assert done.issuperset(prerequisites(4, cell.stage, action))
        done.add((cell.stage, action))
    assert set(order) == {Cell(s, p) for s in range(4) for p in range(13)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stage0: F0 F0 B0 R", "[F0] B0 R"),
        ("stage0: F0 B0", "stage0: F0 B0 []"),
        ("stage0: F0 R B0", "stage0: F0 [R] B0"),
        ("stage0: B0 F0 R", "plays B0 before F0"),
        ("stage0: F1 B1 R", "lacks F0"),
        ("stage0: F0 F1 B0 B1 R\nstage1: F0 F1 B0 R", "stage1 lacks B1"),
        ("stage0: F0 F1 B0 B1 R\nstage1: F1 F0 B0 B1 R", "stage1: [F1] F0 B0 B1 R"),
        ("stage0: F0 B0 F1 B1 R\nstage1: F0 F1 B0 B1 R", "stage0: F0 [B0] F1 B1 R"),
    ],
)
def test_bad_cells_are_shown(text: str, reason: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(parsed(text))
    assert reason in str(caught.value)


def test_deadlock_names_every_waiting_stage() -> None:
    with pytest.raises(ScheduleError, match="deadlock") as caught:
        check_schedule(parsed("stage0: F0 B0 F1 B1 R\nstage1: F0 F1 B0 B1 R"))
    assert "stage0 at B0 for B0 of stage1; stage1 at F1 for F1 of stage0" in str(caught.value)


def test_microbatches_beyond_the_count_are_refused() -> None:
    row = (Action(ActionKind.FORWARD, 1), Action(ActionKind.BACKWARD, 1), REDUCE)
    with pytest.raises(ScheduleError, match="only 1 microbatches"):
        check_schedule(Schedule(ScheduleKind.GPIPE, 1, 1, (row,)))


@pytest.mark.parametrize(
    "text", ["stage0 F0 B0 R", "stage1: F0 B0 R", "stage0: F B0 R", "stage0: X0", ""]
)
def test_malformed_text(text: str) -> None:
    with pytest.raises(ScheduleError):
        parsed(text)


def test_values_are_checked_at_birth() -> None:
    with pytest.raises(ScheduleError, match="R does not"):
        Action(ActionKind.FORWARD)
    with pytest.raises(ScheduleError, match="R does not"):
        Action(ActionKind.REDUCE, 0)
    with pytest.raises(ScheduleError, match="from 0"):
        Action(ActionKind.FORWARD, -1)
    with pytest.raises(ScheduleError, match="one row per stage"):
        Schedule(ScheduleKind.GPIPE, 2, 1, ())
    with pytest.raises(ScheduleError, match="at least one"):
        gpipe(0, 1)
