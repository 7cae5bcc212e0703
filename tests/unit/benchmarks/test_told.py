"""Plans by recipe have the layouts that the recipe says, and are plans of the model."""

from __future__ import annotations

import pytest
import torch

from autopar.api import graph_of_plan
from autopar.graph.precision import Precision
from autopar.plan import ParallelPlan
from benchmarks.runners import FORCED
from benchmarks.suites import build
from benchmarks.told import told_plan
from cost_models import Cluster


@pytest.mark.parametrize("name", ["zero-2", "tensor parallel"])
def test_layouts_are_those_of_the_recipe(name: str) -> None:
    grid = FORCED[name]
    with torch.device("meta"):
        model, batch = build("gpt-tiny", 4)
    plan = told_plan(model, batch, Cluster.parse("h100:1x2"), grid, Precision())
    (stage,) = plan.stages
    weights = stage.parameters["parameter_blocks_1_up_weight"]
    if name == "zero-2":
        assert set(stage.inputs.values()) == {"S0"}
        assert (weights.rest, weights.step) == ("S0", "R")
        assert stage.outputs["parameter_blocks_1_up_weight"] == "S0"
    else:
        assert set(stage.inputs.values()) == {"R"}
        assert weights.rest == weights.step == "S0"
        assert stage.parameters["parameter_blocks_1_down_weight"].step == "S1"
    assert ParallelPlan.from_json(plan.to_json()).stages == plan.stages
    graph_of_plan(model, batch, plan)
