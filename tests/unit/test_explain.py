"""Explanations against the integer program itself: sums, single changes, what is alive."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autopar.errors import OptionError, PlanError
from autopar.explain import (
    ONCE_PER_STEP,
    ExplainedStage,
    Kind,
    at_peak,
    best_change,
    decision,
    explained_stages,
    ledger,
    matching,
    operator_costs,
    tensors,
)
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph, Phase
from autopar.intraop.memory_use import transient_bytes
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import make_plan
from autopar.report.explain import binding, decisions_report, explain_record, explain_report
from autopar.report.text import rendered_text
from cost_models import Cluster
from tests.unit.intraop.stages import gpt2_graph

Explained = tuple[Graph, ParallelPlan, tuple[ExplainedStage, ...]]


@pytest.fixture(scope="module")
def explained() -> Explained:
    """Two stages of two, everything sharded that a pattern names, so that collectives occur."""
    graph = cluster_layers(
        gpt2_graph(4, 16, 2, n_embd=32, n_head=4, n_positions=16, vocab_size=64), None
    )
    options = SearchOptions(
        num_stages=2,
        mesh_shape=(2,),
        remat=Remat.SELECTIVE,
        placements={"*.weight": "S0"},
        cache=False,
    )
    plan = make_plan(graph, Cluster.parse("h100:1x4"), num_microbatches=2, options=options)
    return graph, plan, explained_stages(graph, plan)


def test_the_ledger_sums_to_the_prediction(explained: Explained) -> None:
    for stage in explained[2]:
        spent, p = ledger(stage), stage.plan.prediction
        micro = [v for k, v in spent.items() if k not in (*ONCE_PER_STEP, Kind.TRANSFER)]
        assert sum(micro) == pytest.approx(p.forward_s + p.backward_s, rel=1e-9)
        assert sum(spent[k] for k in ONCE_PER_STEP) == pytest.approx(p.step_s, rel=1e-9)
        assert spent[Kind.RECOMPUTE] > 0 and spent[Kind.TRANSFER] > 0
        assert spent[Kind.GATHER] + spent[Kind.STEP_GATHER] > 0
        assert spent[Kind.REDUCE] + spent[Kind.STEP_REDUCE] > 0
        compute = sum(spent[k] for k in (Kind.FORWARD, Kind.BACKWARD, Kind.RECOMPUTE))
        assert sum(c.seconds for c in operator_costs(stage)) == pytest.approx(compute)


def test_tensors_and_what_is_alive_sum_to_the_bytes(explained: Explained) -> None:
    for stage in explained[2]:
        p, chosen = stage.plan.prediction, stage.built.read(stage.choice)
        sums = {"parameter": 0.0, "gradient": 0.0, "saved": 0.0}
        for tensor in tensors(stage):
            sums[tensor.kind] += tensor.nbytes
        assert sums["parameter"] == pytest.approx(p.parameter_bytes + p.optimizer_bytes)
        assert sums["gradient"] == pytest.approx(p.gradient_bytes)
        assert sums["saved"] == pytest.approx(p.saved_bytes * p.in_flight)
        alive = max(sum(a.nbytes for a in at_peak(stage, phase)) for phase in Phase)
        transient = transient_bytes(
            stage.prepared.graph,
            stage.built.dims,
            chosen.strategies,
            chosen.inputs,
            stage.costs.mesh.axis_sizes,
            outputs=chosen.outputs,
        )
        assert alive - p.saved_bytes == pytest.approx(transient)


def test_alternatives_are_the_objective_with_one_choice_changed(explained: Explained) -> None:
    stage = explained[2][1]
    problem, before = stage.built.problem, stage.built.problem.seconds(stage.choice)
    checked = 0
    for number in range(0, len(stage.choice), 7):
        found = decision(stage, number)
        changes = []
        for other in range(len(stage.built.nodes[number].choices)):
            choice = (*stage.choice[:number], other, *stage.choice[number + 1 :])
            change = (problem.seconds(choice) - before) * stage.num_microbatches
            if other != stage.choice[number] and change < float("inf"):
                changes.append(change)
        assert [a.seconds for a in found.alternatives] == pytest.approx(sorted(changes), abs=1e-12)
        checked += len(changes)
    assert checked > 100


def test_no_single_change_is_faster_unless_a_pin_forbids_it(explained: Explained) -> None:
    graph, pinned, stages = explained
    change = best_change(stages[1])
    assert change is not None and change[0].kind == "parameter" and change[1].seconds < 0
    assert "a pin" in " ".join(binding(pinned, stages))
    options = SearchOptions(num_stages=1, mesh_shape=(2,), remat=Remat.NONE, cache=False)
    free = make_plan(graph, Cluster.parse("h100:1x2"), options=options)
    assert free.search.gap == 0
    assert [best_change(stage) for stage in explained_stages(graph, free)] == [None]


def test_patterns_name_parameters_modules_and_operators(explained: Explained) -> None:
    stages = explained[2]
    (weight, *others) = matching(stages, "transformer.h.0.mlp.c_fc.weight")
    assert (weight.kind, weight.name) == ("parameter", "transformer.h.0.mlp.c_fc.weight")
    assert weight.chosen.startswith("S0 /")
    assert {d.kind for d in others} == {"gradient"}
    assert "R / R" in {a.text for a in weight.alternatives}
    kinds = [d.kind for d in matching(stages, "transformer.h.1.mlp*")]
    assert kinds[0] == "parameter" and kinds[-1] == "operator"
    assert {d.kind for d in matching(stages, "addmm_*")} == {"operator"}
    with pytest.raises(OptionError, match="wte"):
        matching(stages, "wtee")


def test_the_report_says_what_binds(explained: Explained) -> None:
    _, plan, stages = explained
    sentences = " ".join(binding(plan, stages))
    assert "memory is not full" in sentences and "idle" in sentences
    full = replace(plan, budget_bytes=stages[0].plan.prediction.peak_bytes)
    assert "memory binds on the devices of stage 0" in " ".join(binding(full, stages))
    text = rendered_text(explain_report(plan, stages), 120)
    assert "forward compute" in text and "saved, 2 in flight" in text
    found = matching(stages, "transformer.h.0.mlp.c_fc.weight")
    assert "chosen" in rendered_text(decisions_report(found), 120)
    record = json.loads(json.dumps(explain_record(plan, stages, found)))
    assert len(record["stages"]) == 2 and record["decisions"][0]["alternatives"]


def test_a_prediction_of_another_cost_model_is_said_to_be_one(explained: Explained) -> None:
    graph, plan, _ = explained
    first = plan.stages[0]
    slower = replace(first, prediction=replace(first.prediction, forward_s=1.0))
    old = replace(plan, stages=(slower, *plan.stages[1:]))
    assert "another version" in " ".join(binding(old, explained_stages(graph, old)))


def test_a_choice_that_does_not_exist_is_an_error(explained: Explained) -> None:
    graph, plan, _ = explained
    first = plan.stages[0]
    name = next(iter(first.strategies))
    broken = replace(first, strategies={**first.strategies, name: "zz"})
    with pytest.raises(PlanError, match=f"operator {name} 'zz'"):
        explained_stages(graph, replace(plan, stages=(broken, *plan.stages[1:])))
