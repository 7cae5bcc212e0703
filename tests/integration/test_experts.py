"""Mixtures of experts: the search's plans, every strategy of the experts by force, real processes.

Losses have the routers' balance term, which is a product of means over tokens: wrong under sharded
tokens unless both means are those of all tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from autopar.api import plan_model
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.precision import in_float64
from autopar.graph.program import Graph
from autopar.layout import raw_dims
from autopar.lowering.lower import lower_plan
from autopar.lowering.program import CollectiveOp, Communicate, Exchange
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.runtime.launch import run_processes
from autopar.runtime.virtual import unshard
from autopar.verify import (
    TOLERANCES,
    State,
    Step,
    parallel_step,
    relative_errors,
    single_step,
    state_of,
    verify_plan,
)
from benchmarks.models import moe
from benchmarks.zoo import FAST_LINKS, PLANS
from cost_models import Cluster
from tests.integration import exchange
from tests.moe import BATCH, mixtral, qwen3_moe
from tests.plans import random_plan, with_strategy

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


def test_two_stages_of_two() -> None:
    model, batch = mixtral()
    plan, _ = plan_model(model, batch, FAST, options=PLANS["2 stages of 2"])
    assert any(text != "-" for text in of_experts(plan).values())
    for dtype in TOLERANCES:
        report = verify_plan(model, batch, plan, dtype=dtype, eager=dtype == "float32")
        assert report.ok, report


@cache
def reference() -> tuple[Graph, State, Step]:
    """A Mixtral of one layer at half of the batch, in float64, and its step on one device."""
    model, batch = mixtral(num_hidden_layers=1)
    half = {key: tensor[: BATCH // 2] for key, tensor in batch.items()}
    graph = in_float64(cluster_layers(capture_graph(model, half)))
    state = state_of(model.double(), batch)
    return graph, state, single_step(graph, state, 2, seed=0)


@pytest.mark.parametrize(
    ("mesh", "text"),
    [((4,), text) for text in "tefx"]
    + [((2, 2), text) for text in ("t x", "x x", "f x", "x1 t1", "e f")],
)
def test_every_strategy(mesh: tuple[int, ...], text: str) -> None:
    graph, state, single = reference()
    plan = with_strategy(random_plan(graph, [mesh], random.Random(0)), "experts", text)
    parallel = parallel_step(graph, state, plan, seed=0)
    torch.testing.assert_close(parallel.loss, single.loss, rtol=1e-12, atol=0)
    errors = relative_errors(parallel.gradients, single.gradients)
    assert max(errors.values()) < TOLERANCES["float64"], errors


def test_processes_exchange_rows() -> None:
    """Two gloo processes: rows of any number, down to none, and back."""
    mesh = LogicalMesh((2,))
    ranks = run_processes(exchange.run, 2)
    for number, target in enumerate(exchange.TARGETS):
        whole = target(*exchange.arguments(target), "silu", 0, exchange.NUM)
        for index, want in enumerate(whole if isinstance(whole, tuple) else (whole,)):
            shards = [rank[number][index] for rank in ranks]
            got = unshard(shards, raw_dims(tuple(want.shape)), (0,), mesh)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def collectives(plan: ParallelPlan, graph: Graph) -> Counter[str]:
    """How many of each kind the programs of a plan of one stage have."""
    (stage,) = lower_plan(graph, plan).stages
    body = (*stage.forward.body, *stage.backward.body)
    return Counter(
        instruction.op.value if isinstance(instruction, Communicate) else "exchange"
        for instruction in body
        if isinstance(instruction, (Communicate, Exchange))
    )


def test_64_experts_exchange_rows_on_8_devices() -> None:
    """Grouped form: each device keeps eight experts, complete, and rows go to them."""
    sizes = {"num_experts": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    model, batch = qwen3_moe(**sizes)
    options = SearchOptions(num_stages=1, num_microbatches=1, mesh_shape=(8,))
    plan, graph = plan_model(model, batch, FAST_8, options=options)
    (stage,) = plan.stages
    assert of_experts(plan) == {"experts": "x", "experts_backward": "x"}
    placed = [p for name, p in stage.parameters.items() if "experts" in name]
    assert [(p.rest, p.step) for p in placed] == [("S0", "S0")] * 2
    assert collectives(plan, graph)["exchange"] == 2 + 5
    assert verify_plan(model, batch, plan, dtype="float64", eager=False).ok


def test_64_experts_of_gshard_are_sharded_by_all_to_all() -> None:
    """Einsum form: slots are made by the devices of the tokens, computed by those of the experts.
    The balance loss is a product of means over tokens."""
    config = moe.MoEConfig(32, 2, 8, 64, feed_forward=128, vocab_size=64, seq_len=32)
    torch.manual_seed(0)
    model, batch = moe.MoE(config), moe.example_batch(config, 8)
    options = SearchOptions(num_stages=1, num_microbatches=1, mesh_shape=(8,))
    plan, graph = plan_model(model, batch, FAST_8, options=options)
    (stage,) = plan.stages
    placed = [p for name, p in stage.parameters.items() if "mlp_up_EHF" in name or "EFH" in name]
    assert [(p.rest, p.step) for p in placed] == [("S0", "S0")] * 2
    assert set(stage.inputs.values()) == {"S0"}  # tokens stay where their samples are
    assert collectives(plan, graph)[CollectiveOp.ALL_TO_ALL] >= 4  # out and back, twice
    assert verify_plan(model, batch, plan, dtype="float64", eager=False).ok
