"""An operator that nobody wrote a rule for, planned, sharded and trained in four processes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autopar.api import graph_of_plan, plan_model
from autopar.errors import PlanError, RuleWarning
from autopar.lowering.lower import _check_rules, lower_plan
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.verify import verify_plan
from cost_models import Cluster
from tests.integration import custom_model

FAST = Cluster.from_toml("tests/clusters/fast_links.toml")
GLOW = "a b c, c -> a b c; linear 1"
BACKWARD = "a b c, a b c, c -> a b c, c; sums a b; linear 0"


@pytest.fixture(scope="module")
def planned() -> tuple[ParallelPlan, list[str]]:
    model, batch = custom_model.load()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = SearchOptions(num_stages=1, num_microbatches=2)
        plan, _ = plan_model(model, batch, FAST, options=options)
    return plan, [str(w.message) for w in caught if w.category is RuleWarning]


def test_one_warning_per_operator_says_what_was_found(
    planned: tuple[ParallelPlan, list[str]],
) -> None:
    plan, sentences = planned
    assert (
        sentences
        == list(plan.unwritten_rules())
        == [
            f"custom.glow.default has no sharding rule; found by running it: {GLOW}",
            f"custom.glow_backward.default has no sharding rule; found by running it: {BACKWARD}",
        ]
    )
    assert not plan.fallbacks


def test_four_processes_train_like_one(planned: tuple[ParallelPlan, list[str]]) -> None:
    plan, _ = planned
    assert plan.num_devices == 4
    model, batch = custom_model.load()
    graph = graph_of_plan(model, batch, plan)
    own = [op.name for op in graph.operators if op.op_name.startswith("custom.")]
    texts = [plan.stages[0].strategies[name].split() for name in own]
    assert len(own) == 4 and all({*text} & {"a", "b", "c"} for text in texts), texts
    report = verify_plan(
        model, batch, plan, dtype="float64", processes=custom_model.load, eager=True
    )
    assert report.ok and report.eager is not None, report.errors


def test_a_plan_of_other_rules_is_refused(planned: tuple[ParallelPlan, list[str]]) -> None:
    plan, _ = planned
    model, batch = custom_model.load()
    graph = graph_of_plan(model, batch, plan)
    lower_plan(graph, plan)
    for rules in (
        {**plan.rules, "custom.glow.default": "discovered: a b c, c -> a b c"},
        {"custom.glow.default": plan.rules["custom.glow.default"]},
    ):
        with pytest.raises(PlanError, match=r"another sharding rule of custom\.glow.*plan again"):
            lower_plan(graph, replace(plan, rules=rules))


def test_reasons_for_replication_may_differ_between_machines() -> None:
    prepared: Any = [
        SimpleNamespace(table=SimpleNamespace(unwritten=lambda: {"x": "replicated: a"}))
    ]
    plan: Any = SimpleNamespace(rules={"x": "replicated: b"})
    _check_rules(plan, prepared)
    with pytest.raises(PlanError, match="replicated there, none here"):
        _check_rules(plan, [])
