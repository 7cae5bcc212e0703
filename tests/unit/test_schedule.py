"""Schedules: golden text, proofs, and the counts that the memory model uses."""

from __future__ import annotations

import pytest

from autopar.actions import Action, ActionKind, prerequisites
from autopar.errors import ScheduleError
from autopar.schedule import (
    Cell,
    Schedule,
    ScheduleKind,
    build_schedule,
    check_schedule,
    execution_order,
    gpipe,
    in_flight,
    in_flight_count,
    interleaved,
    one_f_one_b,
    zb_h1,
)

GPIPE, INTERLEAVED, ZB_H1 = ScheduleKind.GPIPE, ScheduleKind.INTERLEAVED, ScheduleKind.ZB_H1

# (kind, stages, microbatches, workers)
SHAPES = [
    (kind, stages, microbatches, stages)
    for kind in ScheduleKind
    for stages, microbatches in [(1, 1), (1, 4), (2, 1), (2, 2), (3, 8), (4, 2), (5, 5), (8, 16)]
] + [
    (INTERLEAVED, workers * chunks, workers * groups, workers)
    for workers, chunks, groups in [
        (1, 3, 2),
        (2, 2, 1),
        (2, 2, 4),
        (3, 2, 2),
        (4, 3, 1),
        (4, 2, 3),
    ]
]


def parsed(text: str, kind: ScheduleKind = GPIPE) -> Schedule:
    return Schedule.parse(text, kind=kind)


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


def test_interleaved_text() -> None:
    """Narayanan et al., SC'21, figure 4, for two devices of two chunks: stage 2 is the second one
    of worker 0."""
    assert str(interleaved(num_stages=4, num_microbatches=4, num_workers=2)) == (
        "worker0: 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3 2R 0R\n"
        "worker1: 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 3R 1R"
    )


def test_zb_h1_text() -> None:
    """1F1B's forwards and backwards; W of stage s lags s microbatches behind B."""
    schedule = zb_h1(num_stages=3, num_microbatches=4)
    assert str(schedule) == (
        "stage0: F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3 R\n"
        "stage1: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3 R\n"
        "stage2: F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3 R"
    )
    plain = one_f_one_b(3, 4)
    for row, other in zip(schedule.actions, plain.actions, strict=True):
        assert tuple(a for a in row if a.kind is not ActionKind.WEIGHT) == other


@pytest.mark.parametrize(("kind", "stages", "microbatches", "workers"), SHAPES)
def test_every_family_is_provable_and_parseable(
    kind: ScheduleKind, stages: int, microbatches: int, workers: int
) -> None:
    schedule = build_schedule(kind, stages, microbatches, workers)
    check_schedule(schedule)
    assert schedule.num_workers == workers
    assert Schedule.parse(str(schedule), kind=kind) == schedule


@pytest.mark.parametrize(("kind", "stages", "microbatches", "workers"), SHAPES)
def test_in_flight_closed_form(
    kind: ScheduleKind, stages: int, microbatches: int, workers: int
) -> None:
    schedule = build_schedule(kind, stages, microbatches, workers)
    closed = [
        in_flight_count(kind, stages - s, microbatches, num_stages=stages, num_workers=workers)
        for s in range(stages)
    ]
    assert in_flight(schedule) == tuple(closed)
    bounds = [in_flight_count(kind, stages - s, microbatches) for s in range(stages)]
    assert all(count <= bound for count, bound in zip(closed, bounds, strict=True))


def test_in_flight_values() -> None:
    assert in_flight(one_f_one_b(4, 3)) == (3, 3, 2, 1)
    assert in_flight(gpipe(2, 3)) == (3, 3)
    assert in_flight(interleaved(4, 4, 2)) == (4, 3, 2, 1)
    with pytest.raises(ScheduleError, match="stages count from 1"):
        in_flight_count(GPIPE, 0, 1)
    with pytest.raises(ScheduleError, match="of only 2 stages"):
        in_flight_count(ZB_H1, 3, 1, num_stages=2)


@pytest.mark.parametrize("num_microbatches", [1, 3, 4, 9])
def test_zb_h1_holds_no_more_than_one_f_one_b(num_microbatches: int) -> None:
    """Until W; no stage more than 1F1B's first one. Until B, what 1F1B has."""
    schedule, plain = zb_h1(4, num_microbatches), one_f_one_b(4, num_microbatches)
    assert in_flight(schedule) == (max(in_flight(plain)),) * 4
    until_b = tuple(
        tuple(a for a in row if a.kind is not ActionKind.WEIGHT) for row in schedule.actions
    )
    assert in_flight(Schedule(GPIPE, 4, num_microbatches, until_b)) == in_flight(plain)


def test_interleaved_needs_whole_groups_of_microbatches() -> None:
    with pytest.raises(ScheduleError, match="multiple of 2 microbatches: got 3"):
        interleaved(4, 3, 2)
    assert str(interleaved(3, 4, 3)) == str(one_f_one_b(3, 4))  # one stage each: any number


def test_stages_share_workers_only_where_the_family_says_so() -> None:
    with pytest.raises(ScheduleError, match="one row per stage in a 1f1b schedule"):
        build_schedule(ScheduleKind.ONE_F_ONE_B, 4, 4, 2)
    with pytest.raises(ScheduleError, match="3 stages on 2 workers"):
        interleaved(3, 4, 2)


def test_execution_order_respects_prerequisites() -> None:
    for schedule in (one_f_one_b(4, 6), zb_h1(4, 6), interleaved(4, 6, 2)):
        order = execution_order(schedule)
        done: set[Action] = set()
        for cell in order:
            action = schedule.actions[cell.worker][cell.position]
            assert done.issuperset(prerequisites(4, action))
            done.add(action)
        rows = enumerate(schedule.actions)
        assert set(order) == {Cell(w, p) for w, row in rows for p in range(len(row))}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stage0: F0 F0 B0 R", "[F0] B0 R"),
        ("stage0: F0 B0", "stage0: F0 B0 []"),
        ("stage0: F0 R B0", "stage0: F0 R [B0]"),
        ("stage0: B0 F0 R", "plays B0 before F0"),
        ("stage0: F1 B1 R", "lacks F0"),
        ("stage0: F0 B0 W0 R", "stage0: F0 B0 [W0] R"),
        ("stage0: F0 1B0 R\nstage1: F0 B0 R", "stage0: F0 [B0] R"),
        ("stage0: F0 F1 B0 B1 R\nstage1: F0 F1 B0 R", "stage1 lacks B1"),
        ("stage0: F0 F1 B0 B1 R\nstage1: F1 F0 B0 B1 R", "stage1: [F1] F0 B0 B1 R"),
        ("stage0: F0 B0 F1 B1 R\nstage1: F0 F1 B0 B1 R", "stage0: F0 [B0] F1 B1 R"),
    ],
)
def test_bad_cells_are_shown(text: str, reason: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(parsed(text))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (ZB_H1, "stage0: F0 B0 R", "stage0 lacks W0"),
        (ZB_H1, "stage0: F0 W0 B0 R", "plays W0 before B0"),
        (ZB_H1, "stage0: F0 B0 R W0", "[W0]"),
        (INTERLEAVED, "worker0: 0F0 1F0 1B0 0B0 0R 1R", "0R [1R]"),
        (INTERLEAVED, "worker0: 0F0 1F0 0B0 1B0 1R 0R", "deadlock"),
        (INTERLEAVED, "worker0: 0F0 2F0 2B0 0B0 2R 0R\nworker1: 1F0 3F0 3B0 1B0 3R", "lacks R"),
        (INTERLEAVED, "worker0: 0F0 3F0 3B0 0B0 3R 0R\nworker1: 1F0", "played by another row"),
    ],
)
def test_bad_cells_of_the_newer_families(kind: ScheduleKind, text: str, reason: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(parsed(text, kind))
    assert reason in str(caught.value)


def test_deadlock_names_every_waiting_stage() -> None:
    with pytest.raises(ScheduleError, match="deadlock") as caught:
        check_schedule(parsed("stage0: F0 B0 F1 B1 R\nstage1: F0 F1 B0 B1 R"))
    assert "stage0 at B0 for B0 of stage1; stage1 at F1 for F1 of stage0" in str(caught.value)


def test_microbatches_beyond_the_count_are_refused() -> None:
    forward, backward = Action(ActionKind.FORWARD, 0, 1), Action(ActionKind.BACKWARD, 0, 1)
    row = (forward, backward, Action(ActionKind.REDUCE, 0))
    with pytest.raises(ScheduleError, match="only 1 microbatches"):
        check_schedule(Schedule(GPIPE, 1, 1, (row,)))


@pytest.mark.parametrize(
    "text", ["stage0 F0 B0 R", "stage1: F0 B0 R", "stage0: F B0 R", "stage0: X0", ""]
)
def test_malformed_text(text: str) -> None:
    with pytest.raises(ScheduleError):
        parsed(text)


def test_values_are_checked_at_birth() -> None:
    with pytest.raises(ScheduleError, match="R does not"):
        Action(ActionKind.FORWARD, 0)
    with pytest.raises(ScheduleError, match="R does not"):
        Action(ActionKind.REDUCE, 0, 0)
    with pytest.raises(ScheduleError, match="from 0"):
        Action(ActionKind.FORWARD, 0, -1)
    with pytest.raises(ScheduleError, match="one row per stage"):
        Schedule(GPIPE, 2, 1, ())
    with pytest.raises(ScheduleError, match="at least one"):
        gpipe(0, 1)
