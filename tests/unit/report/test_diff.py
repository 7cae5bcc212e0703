from __future__ import annotations

import json
from dataclasses import replace

from autopar.plan import ParameterPlacement, Remat
from autopar.report.diff import Change, diff_record, diff_report, plan_difference
from autopar.report.text import rendered_text
from autopar.schedule import ScheduleKind
from tests.unit.report.plans import hand_plan


def test_equal_plans_decide_the_same() -> None:
    difference = plan_difference(hand_plan(), hand_plan())
    assert difference.decisions_equal and difference.same_graph
    assert {f.ratio for f in difference.figures} == {1.0}
    assert "decide the same" in rendered_text(diff_report(difference, "a", "b"))


def test_what_differs_is_grouped() -> None:
    plan = hand_plan()
    first, second = plan.stages
    whole = ParameterPlacement("R R", "R R")
    changed = replace(
        first,
        strategies={name: text.replace("b", "-") for name, text in first.strategies.items()},
        parameters=dict.fromkeys(first.parameters, whole),
        prediction=replace(first.prediction, forward_s=0.002),
    )
    other = replace(
        plan,
        stages=(changed, second),
        schedule=ScheduleKind.GPIPE,
        remat=(Remat.NONE, *plan.remat[1:]),
        step_s=2 * plan.step_s,
        graph="another",
    )
    difference = plan_difference(plan, other)
    assert not difference.same_graph
    assert [c.name for c in difference.settings] == ["schedule", "remat"]
    assert difference.placements == (
        Change("model_h_*_fc_weight", "S0 S1, R S1 in the step", "R R", 4),
    )
    assert Change("addmm", "b k", "- k", 4) in difference.strategies
    ratios = {f.name: f.ratio for f in difference.figures}
    assert (ratios["step"], ratios["stage 0 forward"], ratios["stage 1 forward"]) == (2, 2, 1)
    text = rendered_text(diff_report(difference, "a.json", "b.json"), 110)
    assert "different graphs" in text and "gpipe" in text and "b.json" in text
    assert json.loads(json.dumps(diff_record(difference)))["settings"][0]["second"] == "gpipe"


def test_another_number_of_stages_is_a_stage_that_one_plan_lacks() -> None:
    plan = hand_plan()
    first = plan.stages[0]
    one = replace(first, last_layer=7, axis_sizes=(2, 4), devices=tuple(range(8)))
    difference = plan_difference(plan, replace(plan, stages=(one,)))
    assert difference.stages[-1].second == "-"
    assert not [f for f in difference.figures if f.name.startswith("stage")]
