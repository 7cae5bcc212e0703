"""The simulator against closed forms, bounds and the schedule's own counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import ScheduleError
from autopar.schedule import (
    ActionKind,
    Schedule,
    ScheduleKind,
    build_schedule,
    gpipe,
    in_flight,
    one_f_one_b,
)
from autopar.simulate import (
    COMPUTE_STREAM,
    Event,
    StageCost,
    Timeline,
    Transfer,
    link_stream,
    simulate,
)

FORWARD, BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD


def event(timeline: Timeline, stage: int, label: str, stream: str = COMPUTE_STREAM) -> Event:
    wanted = (stage, label, stream)
    (found,) = [e for e in timeline.events if (e.stage, e.label, e.stream) == wanted]
    return found


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 3), (2, 2), (4, 8), (5, 2)])
def test_equal_stages_closed_form(
    kind: ScheduleKind, num_stages: int, num_microbatches: int
) -> None:
    timeline = simulate(
        build_schedule(kind, num_stages, num_microbatches), [StageCost(1.0, 2.0)] * num_stages
    )
    slots = num_microbatches + num_stages - 1
    assert timeline.step_s == slots * 3.0
    assert timeline.busy_s == (num_microbatches * 3.0,) * num_stages
    assert timeline.bubble_fraction == pytest.approx((num_stages - 1) / slots)


def test_once_per_step_work_follows_the_last_backward() -> None:
    costs = [StageCost(1.0, 2.0, reduce_s=0.5, step_s=0.25)] * 2
    timeline = simulate(one_f_one_b(2, 2), costs)
    assert timeline.step_s == 9.75
    assert timeline.busy_s == (6.75, 6.75)
    assert event(timeline, 1, "R").start_s == event(timeline, 1, "B1").end_s
    assert event(timeline, 1, "step").start_s == event(timeline, 1, "R").end_s


@pytest.mark.parametrize("kind", ScheduleKind)
def test_peak_bytes_are_the_most_in_flight_over_time(kind: ScheduleKind) -> None:
    schedule = build_schedule(kind, 4, 6)
    cost = StageCost(1.0, 2.0, rest_bytes=100, saved_bytes_per_microbatch=10, transient_bytes=1)
    timeline = simulate(schedule, [cost] * 4, [Transfer(0, 1, FORWARD, 0.5)])
    for stage, count in enumerate(in_flight(schedule)):
        spans = [
            (event(timeline, stage, f"F{m}").start_s, event(timeline, stage, f"B{m}").end_s)
            for m in range(6)
        ]
        most = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
        assert most == count
        assert timeline.peak_bytes[stage] == 101 + 10 * count


def test_transfers_delay_and_overlap() -> None:
    links = [Transfer(0, 1, FORWARD, 0.5), Transfer(1, 0, BACKWARD, 0.25)]
    timeline = simulate(gpipe(2, 2), [StageCost(1.0, 2.0)] * 2, links)
    assert event(timeline, 0, "F0", link_stream(0, 1)).start_s == 1.0
    assert event(timeline, 0, "F1").start_s == 1.0  # sends overlap with compute
    assert event(timeline, 1, "F0").start_s == 1.5
    assert timeline.step_s == 1.0 + 0.5 + 2 * 3.0 + 0.25 + 2.0


def test_link_is_first_in_first_out_and_can_be_the_bottleneck() -> None:
    timeline = simulate(gpipe(2, 4), [StageCost(1.0, 1.0)] * 2, [Transfer(0, 1, FORWARD, 3.0)])
    sent = [event(timeline, 0, f"F{m}", link_stream(0, 1)) for m in range(4)]
    assert [e.start_s for e in sent] == [1.0, 4.0, 7.0, 10.0]
    assert event(timeline, 1, "F3").start_s == 13.0


def test_skip_edge_delays_only_its_target() -> None:
    costs = [StageCost(1.0, 1.0)] * 3
    plain = simulate(one_f_one_b(3, 1), costs)
    quick = simulate(one_f_one_b(3, 1), costs, [Transfer(0, 2, FORWARD, 0.5)])
    slow = simulate(one_f_one_b(3, 1), costs, [Transfer(0, 2, FORWARD, 5.0)])
    back = simulate(one_f_one_b(3, 1), costs, [Transfer(2, 0, BACKWARD, 5.0)])
    assert plain.step_s == quick.step_s == 6.0
    assert event(slow, 1, "F0").start_s == 1.0
    assert event(slow, 2, "F0").start_s == 6.0
    assert slow.step_s == 6.0 + 4.0
    assert back.step_s == 4.0 + 5.0 + 1.0


def test_deadlock_and_bad_inputs_are_refused() -> None:
    text = "stage0: F0 B0 F1 B1 R\nstage1: F0 F1 B0 B1 R"
    costs = [StageCost(1.0, 1.0)] * 2
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(Schedule.parse(text, kind=ScheduleKind.GPIPE), costs)
    with pytest.raises(ScheduleError, match="one cost per stage"):
        simulate(gpipe(3, 1), costs)
    with pytest.raises(ScheduleError, match="outside"):
        simulate(gpipe(2, 1), costs, [Transfer(0, 2, FORWARD, 1.0)])
    with pytest.raises(ScheduleError, match="later stage"):
        Transfer(1, 0, FORWARD, 1.0)
    with pytest.raises(ScheduleError, match="later stage"):
        Transfer(0, 1, ActionKind.REDUCE, 1.0)
    with pytest.raises(ScheduleError, match="finite"):
        Transfer(0, 1, FORWARD, float("nan"))
    with pytest.raises(ScheduleError, match="backward_s"):
        StageCost(1.0, -1.0)


def test_no_work_takes_no_time() -> None:
    timeline = simulate(gpipe(2, 1), [StageCost(0.0, 0.0)] * 2)
    assert (timeline.step_s, timeline.bubble_fraction) == (0.0, 0.0)


seconds = st.floats(0, 10, allow_nan=False)
stage_costs = st.lists(st.builds(StageCost, seconds, seconds, seconds, seconds), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(ScheduleKind),
    costs=stage_costs.filter(lambda costs: len(costs) <= 6),
    num_microbatches=st.integers(1, 6),
    link_s=st.tuples(seconds, seconds, seconds),
)
def test_bounds_and_stream_order(
    kind: ScheduleKind,
    costs: list[StageCost],
    num_microbatches: int,
    link_s: tuple[float, float, float],
) -> None:
    last = len(costs) - 1
    chain = [Transfer(s, s + 1, FORWARD, link_s[0]) for s in range(last)]
    chain += [Transfer(s + 1, s, BACKWARD, link_s[1]) for s in range(last)]
    skips = [Transfer(0, last, FORWARD, link_s[2])] if last > 1 else []
    timeline = simulate(build_schedule(kind, last + 1, num_microbatches), costs, chain + skips)
    critical = sum(c.forward_s + c.backward_s for c in costs) + sum(t.seconds for t in chain)
    once = costs[0].reduce_s + costs[0].step_s
    assert timeline.step_s >= max(timeline.busy_s) * (1 - 1e-12)
    assert timeline.step_s >= (critical + once) * (1 - 1e-12)
    assert 0 <= timeline.bubble_fraction <= 1
    lanes = {(e.stage, e.stream) for e in timeline.events}
    for lane in lanes:
        spans = [e for e in timeline.events if (e.stage, e.stream) == lane]
        assert all(first.end_s <= second.start_s for first, second in pairwise(spans))


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(ScheduleKind), extra=seconds, stage=st.integers(0, 3))
def test_slower_stage_never_shortens_the_step(kind: ScheduleKind, extra: float, stage: int) -> None:
    schedule, costs = build_schedule(kind, 4, 5), [StageCost(1.0, 2.0)] * 4
    slower = [replace(c, forward_s=1.0 + extra * (s == stage)) for s, c in enumerate(costs)]
    assert simulate(schedule, slower).step_s >= simulate(schedule, costs).step_s
