from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autopar.errors import PlanError, ScheduleError
from autopar.report.text import rendered_text
from autopar.report.whatif import (
    assumptions,
    scenario,
    scenarios,
    simulation_record,
    simulation_report,
)
from autopar.schedule import ScheduleKind
from tests.unit.report.plans import GIB, hand_plan


def test_as_planned_it_is_the_plans_own_step() -> None:
    shown = scenario(hand_plan())
    # 1 ms and 2 ms of two even stages: (B + S - 1) (F + B), and 0.5 ms once per step
    assert shown.timeline.step_s == pytest.approx((4 + 2 - 1) * 0.003 + 0.0005)
    assert shown.peak_bytes == pytest.approx(hand_plan().stages[0].prediction.peak_bytes)


def test_more_microbatches_keep_a_microbatchs_seconds_and_fill_the_bubble() -> None:
    plan = hand_plan()
    shown = scenario(plan, num_microbatches=16)
    assert shown.timeline.step_s == pytest.approx((16 + 2 - 1) * 0.003 + 0.0005)
    assert shown.microbatch_s < scenario(plan).microbatch_s
    assert "4 times the rows" in " ".join(assumptions(plan, shown))


def test_gpipe_holds_every_microbatch() -> None:
    shown = scenario(hand_plan(), ScheduleKind.GPIPE)
    assert shown.peak_bytes == pytest.approx((16.5 + 4 * 10) * GIB)


def test_the_table_has_every_schedule_that_the_stages_can_play() -> None:
    found = list(scenarios(hand_plan()))
    assert {s.plan.schedule for s in found} >= {ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B}
    one = replace(hand_plan().stages[0], last_layer=7)
    alone = replace(hand_plan(), stages=(one,))
    assert {s.plan.schedule for s in scenarios(alone)} == {alone.schedule}


def test_stages_that_share_devices_play_one_schedule_only() -> None:
    first = replace(hand_plan().stages[0], last_layer=3)
    second = replace(first, first_layer=4, last_layer=7)
    plan = replace(hand_plan(), stages=(first, second), schedule=ScheduleKind.INTERLEAVED)
    assert {s.plan.schedule for s in scenarios(plan)} == {ScheduleKind.INTERLEAVED}
    with pytest.raises((PlanError, ScheduleError)):
        scenario(plan, ScheduleKind.GPIPE)


def test_the_report_and_the_record_say_what_is_kept() -> None:
    plan = hand_plan()
    shown = scenario(plan, ScheduleKind.GPIPE, 8)
    text = rendered_text(simulation_report(plan, shown, 99), 120)
    assert text.startswith("stage 0  F0")
    assert "2 times the rows" in text and "of the budget" in text
    record = json.loads(json.dumps(simulation_record(plan, shown)))
    assert (record["schedule"], record["num_microbatches"]) == ("gpipe", 8)
    assert len(record["peak_bytes"]) == 2
