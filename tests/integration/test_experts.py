"""Mixtures of experts: the search's plans, every strategy of the experts by force, real processes.

Losses have the routers' balance term, which is a product of means over tokens: wrong under sharded
tokens unless both means are those of all tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from autopar.api import plan_model
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph
from autopar.lowering.lower import lower_plan
from autopar.lowering.program import CollectiveOp, Communicate, Exchange
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.verify import verify_plan
from benchmarks.models import moe
from benchmarks.verify_zoo import FAST_LINKS, PLANS
from cost_models import Cluster
from tests.moe import BATCH, MODELS, mixtral
from tests.plans import random_plan

FAST = Cluster.from_toml(str(FAST_LINKS))
FAST_8 = replace(FAST, groups=(replace(FAST.groups[0], devices_per_node=8),))


def of_experts(plan: ParallelPlan) -> dict[str, str]:
    """Strategies of the experts' operators by name."""
    return {
        name: text
        for stage in plan.stages
        for name, text in stage.strategies.items()
        if name.startswith("experts") and "__" not in name
    }


@pytest.mark.parametrize("label", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_plans_of_the_search(name: str, label: str) -> None:
    model, batch = MODELS[name]()
    plan, _ = plan_model(model, batch, FAST, options=PLANS[label])
    if label != "4 stages of 1":
        assert any(text.strip("- ") for text in of_experts(plan).values())
    dtypes = ("float64", "float32") if label == "2 stages of 2" else ("float64",)
    for dtype in dtypes:
        report = verify_plan(model, batch, plan, dtype=dtype, eager=dtype == "float32")
        assert report.ok, report


@cache
def graph_of_mixtral() -> Graph:
    model, batch = mixtral()
    half = {key: tensor[: BATCH // 2] for key, tensor in batch.items()}
    return cluster_layers(capture_graph(model, half))


def forced(meshes: list[tuple[int, ...]], text: str) -> ParallelPlan:
    """A random plan but for the experts, whose operators all have this strategy."""
    plan = random_plan(graph_of_mixtral(), meshes, random.Random(0))
    chosen = dict.fromkeys(of_experts(plan), text)
    stages = tuple(
        replace(
            s, strategies={**s.strategies, **{n: chosen[n] for n in chosen if n in s.strategies}}
        )
        for s in plan.stages
    )
    return replace(plan, stages=stages)


@pytest.mark.parametrize(
    ("mesh", "text"),
    [((4,), "t"), ((4,), "e"), ((4,), "f"), ((4,), "x")]
    + [((2, 2), text) for text in ("t x", "x x", "f x", "x1 t1", "e f")],
)
def test_every_strategy(mesh: tuple[int, ...], text: str) -> None:
    model, batch = mixtral()
    report = verify_plan(model, batch, forced([mesh], text), dtype="float64", eager=False)
    assert report.ok, report


def test_processes_exchange_rows() -> None:
    """Two stages of two gloo processes: rows of any number, down to none, and back."""
    model, batch = mixtral()
    plan = forced([(2,), (2,)], "x")
    report = verify_plan(model, batch, plan, dtype="float64", processes=mixtral, eager=False)
    assert report.ok, report
