"""Plans that do not belong to a graph are refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from autopar.errors import PlanError
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph
from autopar.lowering.lower import lower_plan
from autopar.plan import ParallelPlan, ParameterPlacement, StagePlan
from tests.golden.update import Mlp
from tests.plans import random_plan


@cache
def graph() -> Graph:

    return cluster_layers(capture_graph(Mlp(8, 16), (torch.empty(4, 8),)), 1)


def plan() -> ParallelPlan:
    return random_plan(graph(), [(2,)], random.Random(0))


def with_stage(change: Callable[[StagePlan], StagePlan]) -> ParallelPlan:
    made = plan()
    return replace(made, stages=(change(made.stages[0]),))


def placed(rest: str, step: str) -> Callable[[StagePlan], StagePlan]:
    return lambda s: replace(
        s, parameters={**s.parameters, "parameter_up_weight": ParameterPlacement(rest, step)}
    )


def test_a_plan_of_the_graph_is_lowered() -> None:
    (stage,) = lower_plan(graph(), plan()).stages
    assert {p.owner for p in stage.parameters} == {"up.weight", "down.weight"}
    assert set(stage.gradients) == {p.name for p in stage.parameters}
    assert set(stage.saved) <= set(stage.forward.outputs)
    assert set(stage.gather.outputs) == {p.name for p in stage.parameters}


WRONG = {
    "graph": (lambda: replace(plan(), graph="feedfacefeedface"), "another model"),
    "no strategy": (
        lambda: with_stage(lambda s: replace(s, strategies={})),
        "no strategy for operator",
    ),
    "unknown strategy": (
        lambda: with_stage(lambda s: replace(s, strategies={**s.strategies, "mm": "zz"})),
        "operator mm has no strategy 'zz'",
    ),
    "strategy of another mesh": (
        lambda: with_stage(lambda s: replace(s, strategies={**s.strategies, "mm": "i j"})),
        "operator mm",
    ),
    "no placement": (
        lambda: with_stage(lambda s: replace(s, parameters={})),
        "does not place parameter",
    ),
    "no such dim": (lambda: with_stage(placed("S5", "R")), "'up.weight' at rest.*'S5'"),
    "no such dim in step": (lambda: with_stage(placed("S0", "S5")), "'up.weight'.*'S5'"),
    "two axes": (lambda: with_stage(placed("S0 R", "R")), "'S0 R'.*mesh 2"),
    "pending sum": (lambda: with_stage(placed("P", "R")), "'P'"),
    "no layout": (lambda: with_stage(placed("", "R")), "''"),
    "input": (
        lambda: with_stage(lambda s: replace(s, inputs={"batch_0": "S0.1"})),
        "input 'batch_0'",
    ),
    "gradient": (
        lambda: with_stage(lambda s: replace(s, outputs={"parameter_up_weight": "S3"})),
        "output 'parameter_up_weight'",
    ),
    "layers": (
        lambda: replace(
            plan(),
            layer_names=("a", "b"),
            remat=plan().remat * 2,
            stages=(replace(plan().stages[0], last_layer=1),),
        ),
        "2 layers, this graph has 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(PlanError, match=message):
        lower_plan(graph(), make())
