"""The simulator against closed forms, bounds and the schedule's own counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.actions import Action, ActionKind, prerequisites
from autopar.errors import ScheduleError
from autopar.schedule import (
    Schedule,
    ScheduleKind,
    build_schedule,
    gpipe,
    in_flight,
    interleaved,
    one_f_one_b,
    zb_h1,
)
from autopar.simulate import (
    COLLECTIVE_STREAM,
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


@pytest.mark.parametrize("kind", [k for k in ScheduleKind if not k.splits_backward])
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


@pytest.mark.parametrize(("workers", "chunks", "groups"), [(2, 2, 2), (2, 3, 1), (4, 2, 2)])
def test_interleaving_divides_the_bubble(workers: int, chunks: int, groups: int) -> None:
    """Narayanan et al., SC'21, 2.2: (p - 1) (t_f + t_b) / v, with t_f and t_b of a whole worker."""
    cost = StageCost(1.0 / chunks, 2.0 / chunks)
    schedule = interleaved(workers * chunks, workers * groups, workers)
    timeline = simulate(schedule, [cost] * schedule.num_stages)
    busy = workers * groups * 3.0
    assert timeline.step_s == pytest.approx(busy + (workers - 1) * 3.0 / chunks)
    assert timeline.bubble_fraction == pytest.approx(1 - busy / timeline.step_s)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 3), (2, 4), (3, 3), (4, 8)])
def test_zero_bubble_closed_form(num_stages: int, num_microbatches: int) -> None:
    """Qi et al., ICLR 2024, table 2: the bubble of ZB-H1 is (p - 1) (t_f + t_b - t_w); here with
    t_b a whole microbatch's backward less t_w, and all three equal."""
    cost = StageCost(1.0, 2.0, weight_s=1.0)
    timeline = simulate(zb_h1(num_stages, num_microbatches), [cost] * num_stages)
    assert timeline.step_s == 3.0 * num_microbatches + (num_stages - 1)
    assert timeline.busy_s == (num_microbatches * 3.0,) * num_stages


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
    last = "W" if kind.splits_backward else "B"
    cost = StageCost(
        1.0,
        2.0,
        weight_s=1.0,
        rest_bytes=100,
        saved_bytes_per_microbatch=10,
        transient_bytes=1,
        held_bytes_per_microbatch=10,
    )
    timeline = simulate(schedule, [cost] * 4, [Transfer(0, 1, FORWARD, 0.5)])
    for stage, count in enumerate(in_flight(schedule)):
        spans = [
            (event(timeline, stage, f"F{m}").start_s, event(timeline, stage, f"{last}{m}").end_s)
            for m in range(6)
        ]
        most = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
        assert most == count
        assert timeline.peak_bytes[stage] == 101 + 10 * count
        assert timeline.memory[stage][-1][1] == 100  # all is gone at the end
    assert timeline.worker_peak_bytes == timeline.peak_bytes


def test_bytes_come_and_go() -> None:
    cost = StageCost(
        1.0,
        2.0,
        weight_s=0.5,
        rest_bytes=100,
        saved_bytes_per_microbatch=10,
        transient_bytes=1,
        held_bytes_per_microbatch=4,
    )
    whole, split = simulate(one_f_one_b(1, 1), [cost]), simulate(zb_h1(1, 1), [cost])
    assert whole.memory == (((0.0, 111), (1.0, 111), (3.0, 100)),)
    assert split.memory == (((0.0, 111), (1.0, 111), (2.5, 105), (3.0, 100)),)


def test_stages_of_a_worker_share_its_memory() -> None:
    cost = StageCost(1.0, 2.0, rest_bytes=100, saved_bytes_per_microbatch=10)
    timeline = simulate(interleaved(4, 4, 2), [cost] * 4)
    assert timeline.peak_bytes == (140, 130, 120, 110)
    assert timeline.worker_peak_bytes == (250, 230)  # at one time, not the sum of both peaks


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


def test_gathers_hide_in_the_filling_pipeline() -> None:
    costs = [StageCost(1.0, 2.0, gather_s=0.5)] * 2
    timeline = simulate(one_f_one_b(2, 2), costs)
    assert event(timeline, 0, "F0").start_s == 0.5  # exposed here
    assert event(timeline, 1, "F0").start_s == 1.5  # done while stage 1 waits
    assert timeline.exposed_s == (0.5, 0.0)
    assert timeline.step_s == 0.5 + 9.0
    assert timeline.busy_s == (6.5, 6.5)


def test_exposed_transfers_are_what_compute_waits_for() -> None:
    links = [Transfer(0, 1, FORWARD, 0.5), Transfer(1, 0, BACKWARD, 0.25)]
    timeline = simulate(gpipe(2, 2), [StageCost(1.0, 2.0)] * 2, links)
    assert timeline.exposed_s == (0.25, 0.5)  # the second ones arrive while the first are computed


@pytest.mark.parametrize(
    ("reduce_s", "backward_end", "step_end"),
    [
        (1.0, 3.0 + 0.1 / 1.1, 3.0 + 0.1 / 1.1),  # ends inside the backward, which is slower by it
        (2.2, 3.2, 3.2),  # as long as the backward beside it
        (4.0, 3.2, 5.0),  # sticks out: 1.8 s exposed
    ],
)
def test_reductions_overlap_with_the_last_backward(
    reduce_s: float, backward_end: float, step_end: float
) -> None:
    cost = StageCost(1.0, 2.0, reduce_s=reduce_s, step_s=0.5)
    serial = simulate(one_f_one_b(1, 1), [cost])
    assert serial.step_s == 3.0 + reduce_s + 0.5 and serial.exposed_s == (reduce_s,)
    timeline = simulate(one_f_one_b(1, 1), [cost], overlap=True)
    assert event(timeline, 0, "R", COLLECTIVE_STREAM).start_s == 1.0
    assert event(timeline, 0, "B0").end_s == pytest.approx(backward_end)
    assert event(timeline, 0, "step").start_s == pytest.approx(step_end)
    assert timeline.exposed_s[0] == pytest.approx(step_end - backward_end)
    free = simulate(one_f_one_b(1, 1), [cost], overlap=True, overlap_slowdown=1.0)
    assert event(free, 0, "B0").end_s == 3.0
    assert free.step_s <= timeline.step_s <= serial.step_s
    with pytest.raises(ScheduleError, match="at least 1"):
        simulate(one_f_one_b(1, 1), [cost], overlap=True, overlap_slowdown=0.9)


def test_chunks_gather_and_reduce_beside_one_another() -> None:
    """Two stages on one worker: the second one's gather runs beside the first one's forward, its
    reduction beside the first one's backward."""
    cost = StageCost(2.0, 4.0, gather_s=1.0, reduce_s=1.0)
    schedule = interleaved(2, 1, 1)
    serial = simulate(schedule, [cost] * 2)
    overlapped = simulate(schedule, [cost] * 2, overlap=True, overlap_slowdown=1.0)
    assert serial.step_s == 2 * (2.0 + 4.0 + 1.0 + 1.0)
    assert overlapped.step_s == 1.0 + 2 * (2.0 + 4.0)
    assert event(overlapped, 0, "F0").end_s == 3.0
    slow = simulate(schedule, [cost] * 2, overlap=True, overlap_slowdown=2.0)
    assert event(slow, 0, "F0").end_s == 1.0 + 2.5  # one second of the gather at half speed


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
    with pytest.raises(ScheduleError, match="part of backward_s"):
        StageCost(1.0, 1.0, weight_s=2.0)


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


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Schedule, list[StageCost], list[Transfer]]:
    """Any family with random costs, and links between any two stages."""
    kind = draw(st.sampled_from(ScheduleKind))
    workers = draw(st.integers(1, 4))
    chunks = draw(st.integers(1, 3)) if kind.shares_devices else 1
    groups = draw(st.integers(1, 3))
    stages, microbatches = workers * chunks, workers * groups if chunks > 1 else groups
    costs = []
    for _ in range(stages):
        backward = draw(seconds)
        share = draw(st.floats(0, 1))
        once = [draw(seconds) for _ in range(3)]
        costs.append(
            StageCost(
                draw(seconds), backward, *once[:2], weight_s=share * backward, gather_s=once[2]
            )
        )
    pairs = [(s, t) for s in range(stages) for t in range(s + 1, stages) if draw(st.booleans())]
    transfers = [Transfer(s, t, FORWARD, draw(seconds)) for s, t in pairs]
    transfers += [Transfer(t, s, BACKWARD, draw(seconds)) for s, t in pairs if draw(st.booleans())]
    return build_schedule(kind, stages, microbatches, workers), costs, transfers


def longest_path(schedule: Schedule, costs: list[StageCost], transfers: list[Transfer]) -> float:
    """Seconds of the step as the longest path through everything that waits for something else:
    a node per action and per sent value, weighted with what it takes."""
    waits = nx.DiGraph()
    weight: dict[Any, float] = {"start": 0.0, "end": 0.0}

    def node(name: Any, takes: float, after: list[Any]) -> Any:
        weight[name] = takes
        waits.add_edges_from((before, name) for before in [*after, "start"])
        waits.add_edge(name, "end")
        return name

    for row in schedule.actions:
        stages = sorted({action.stage for action in row})
        previous = node(("gathers", stages[0]), sum(costs[s].gather_s for s in stages), [])
        for action in row:
            cost = costs[action.stage]
            split = schedule.kind.splits_backward
            takes = {
                "F": cost.forward_s,
                "B": cost.backward_s - (cost.weight_s if split else 0.0),
                "W": cost.weight_s,
                "R": cost.reduce_s,
            }[str(action.kind)]
            needs = prerequisites(schedule.num_stages, action)
            previous = node(action, takes, [previous, *needs])
        for stage in reversed(stages):
            previous = node(("step", stage), costs[stage].step_s, [previous])
    for link in {(t.source_stage, t.target_stage) for t in transfers}:
        own = [t for t in transfers if (t.source_stage, t.target_stage) == link]
        queue: list[Any] = []
        for action in schedule.actions[link[0] % len(schedule.actions)]:
            for transfer in own if action.stage == link[0] else ():
                if transfer.phase is action.kind:
                    sent = node((transfer, action), transfer.seconds, [action, *queue[-1:]])
                    queue.append(sent)
                    waits.add_edge(sent, Action(action.kind, link[1], action.microbatch))
    ends: dict[Any, float] = {}
    for name in nx.topological_sort(waits):
        begins = max((ends[before] for before in waits.predecessors(name)), default=0.0)
        ends[name] = begins + weight[name]
    return ends["end"]


@settings(max_examples=80, deadline=None)
@given(small_cases())
def test_the_step_is_the_longest_path(
    case: tuple[Schedule, list[StageCost], list[Transfer]],
) -> None:
    schedule, costs, transfers = case
    timeline = simulate(schedule, costs, transfers)
    assert timeline.step_s == pytest.approx(longest_path(schedule, costs, transfers), rel=1e-12)
    quick = simulate(schedule, costs, transfers, overlap=True, overlap_slowdown=1.0)
    assert quick.step_s <= timeline.step_s * (1 + 1e-12)
