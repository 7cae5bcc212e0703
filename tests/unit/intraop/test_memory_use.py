"""Predicted bytes against those that the executor of one rank holds, and small cases by hand."""

from __future__ import annotations

import math

import pytest
import torch

from autopar.graph.program import Graph, TensorMeta
from autopar.intraop.build import build_problem
from autopar.intraop.execution import Execution, gradient_casts
from autopar.intraop.memory_use import reduce_bytes, reshard_extra_bytes, transient_bytes
from autopar.intraop.stage_problem import StageContext
from autopar.lowering.lower import prepare_stages
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import make_plan
from cost_models import Cluster
from tests.unit.intraop.measured import peak_bytes
from tests.unit.intraop.stages import (
    costs_of,
    gpt2_graph,
    graph_of,
    image_graph,
    llama_graph,
)

PARTIAL, REPLICATE = -2, -1


def small_gpt2() -> Graph:
    return gpt2_graph(8, 64, 2, n_embd=64, n_head=4, n_positions=64, vocab_size=256)


def small_llama() -> Graph:
    return llama_graph(
        8, 64, 2, hidden_size=64, intermediate_size=128, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256,
    )  # fmt: skip


def planned(
    graph: Graph, mesh: tuple[int, ...], num_microbatches: int, budget: float | None = None
) -> ParallelPlan:
    return make_plan(
        graph,
        Cluster.parse(f"h100:1x{math.prod(mesh)}"),
        num_microbatches=num_microbatches,
        budget_bytes=budget,
        options=SearchOptions(
            num_stages=1,
            mesh_shape=mesh,
            remat=Remat.SELECTIVE,
            time_limit_s=5.0,
            target_gap=0.5,
            compiled=False,
        ),
    )


def leaves_of(graph: Graph, num_microbatches: int) -> list[torch.Tensor]:
    return [
        torch.ones((m.shape[0] * num_microbatches, *m.shape[1:]), dtype=m.dtype)
        for m in (i.meta for i in graph.inputs if i.kind == "batch")
    ]


def ratio(graph: Graph, plan: ParallelPlan) -> float:
    """Predicted / held, without the optimizer's states, which the executor does not have."""
    prediction = plan.stages[0].prediction
    held = peak_bytes(graph, plan, leaves_of(graph, plan.num_microbatches))
    found = (prediction.peak_bytes - prediction.optimizer_bytes) / held
    print(f"{plan.stages[0].axis_sizes}, {plan.num_microbatches} microbatches: {found:.3f}")
    return found


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("mesh", [(1,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_what_is_predicted_is_held(name: str, mesh: tuple[int, ...], num_microbatches: int) -> None:
    """Never below by more than 3 %."""
    graph = {"mlp": lambda: graph_of("mlp"), "gpt2": small_gpt2, "llama": small_llama}[name]()
    plan = planned(graph, mesh, num_microbatches)
    assert 0.97 <= ratio(graph, plan) <= 1.5


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_under_a_budget_too(name: str) -> None:
    graph = {"mlp": lambda: graph_of("mlp"), "gpt2": small_gpt2}[name]()
    free = planned(graph, (4,), 3).stages[0].prediction.peak_bytes
    plan = planned(graph, (4,), 3, 0.75 * free)
    assert plan.stages[0].prediction.peak_bytes <= 0.75 * free
    assert 0.97 <= ratio(graph, plan) <= 1.5


@pytest.mark.parametrize(
    ("source", "target", "extra"),
    [
        ((0,), (0,), 0.0),
        ((0,), (REPLICATE,), 0.0),  # gathered along dim 0: nothing beside source and result
        ((1,), (REPLICATE,), 100.0),  # gathered, then transposed: 25 + 100 + 100
        ((PARTIAL,), (0,), 0.0),
        ((PARTIAL,), (1,), 100.0),  # transposed before it is scattered: 100 + 100 + 25
        ((PARTIAL,), (REPLICATE,), 0.0),
        ((0,), (1,), 25.0),
    ],
)
def test_reshards_on_the_way(
    source: tuple[int, ...], target: tuple[int, ...], extra: float
) -> None:
    assert reshard_extra_bytes(100.0, (), source, target, (4,)) == extra


def test_gradients_are_reduced_one_after_the_other() -> None:
    meta = TensorMeta((4, 5), torch.float32)
    data_parallel = [(meta, (), (PARTIAL,), (REPLICATE,))] * 3
    assert reduce_bytes(data_parallel, (2,)) == 80
    assert reduce_bytes([(meta, (), (0,), (0,))] * 3, (2,)) == 0
    assert reduce_bytes([(meta, (), (PARTIAL,), (0,))] * 3, (2,)) == 40
    gathered = [(meta, (), (0,), (REPLICATE,))] * 3  # grows by half a gradient each
    assert reduce_bytes(gathered, (2,)) == 80 + 40 + 40


def test_gradients_of_convolutions_stay_narrow_unless_sums_are_pending() -> None:
    """Such a sum is done behind the cast (two devices; all else as the first choices say)."""
    (stage,) = prepare_stages(image_graph(), Remat.NONE, [0], compiled=True)
    built = build_problem(stage.graph, stage.table, costs_of((2,)), StageContext(compiled=True))
    left = gradient_casts(stage.graph, Execution.STEP).left

    def transient(placement: int, execution: Execution) -> float:
        choice = tuple(
            next(
                i
                for i, option in enumerate(node.choices)
                if node.name not in left or option.results[0] == (placement,)
            )
            for node in built.nodes
        )
        chosen = built.read(choice)
        assert {chosen.strategies[name].results[0] for name in left} == {(placement,)}
        layouts = built.dims, chosen.strategies, chosen.inputs, (2,)
        return transient_bytes(stage.graph, *layouts, execution=execution)

    assert transient(PARTIAL, Execution.STEP) == transient(PARTIAL, Execution.PROGRAMS)
    assert transient(REPLICATE, Execution.STEP) < transient(REPLICATE, Execution.PROGRAMS)
