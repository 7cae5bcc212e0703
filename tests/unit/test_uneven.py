"""Sizes that no mesh divides, from the search to the step: vocabulary, heads, widths, batches."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autopar.api import plan_model
from autopar.graph.program import TensorMeta
from autopar.intraop.build import parameter_choices
from autopar.layout import is_uneven, local_share, raw_dims
from autopar.lowering.lower import lower_plan
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.runtime.data import data_shard
from autopar.runtime.simulated import VirtualRun
from autopar.sharding.registry import rule_for
from autopar.sharding.rule import Call, Slot
from autopar.sharding.strategy import strategies
from autopar.verify import verify_plan
from cost_models import Cluster
from tests import uneven
from tests.plans import random_plan
from tests.unit.runtime.reference import expected_step, worst_error, zoo_case

aten = torch.ops.aten
SEED = 5


def _planned(model: nn.Module, batch: Any, mesh: tuple[int, ...], **pins: str) -> ParallelPlan:
    options = SearchOptions(num_stages=1, num_microbatches=1, mesh_shape=mesh, placements={**pins})
    return plan_model(model, batch, Cluster.parse(f"cpu:1x{math.prod(mesh)}"), options=options)[0]


def test_gpt2_with_an_odd_vocabulary_and_five_heads() -> None:
    """Seven rows on four devices, the embedding and the head of 131 tokens sharded by token."""
    model, batch = uneven.gpt2(7)
    pins = {"transformer.wte.weight": "S0", "transformer.h.0.mlp.c_proj.weight": "S1"}
    plan = _planned(model, batch, (4,), **pins)
    rest = plan.stages[0].parameters["parameter_transformer_wte_weight"].rest
    assert rest == "S0"
    for dtype in ("float32", "float64"):
        report = verify_plan(model, batch, plan, dtype=dtype, eager=dtype == "float32")
        assert report.ok, report


@pytest.mark.parametrize(
    ("rows", "mesh", "pin"), [(5, (2,), "S0"), (7, (4,), "S0"), (5, (2, 2), "S0 S1")]
)
def test_an_odd_batch(rows: int, mesh: tuple[int, ...], pin: str) -> None:
    """Batch norm's statistics are those of all rows, the loss counts each once."""
    model, batch = uneven.images(rows)
    plan = _planned(model, batch, mesh, **{"body.0.weight": pin})
    report = verify_plan(model, batch, plan)
    assert report.ok, report


def test_the_vocabulary_of_gpt2_is_sharded() -> None:
    """50257 tokens on 4 devices: embedding, head, their gradients and the loss."""
    meta = torch.device("meta")
    weight, rows = torch.empty(50257, 768, device=meta), torch.empty(64, 768, device=meta)
    tokens = torch.empty(64, dtype=torch.int64, device=meta)
    logits = torch.empty(64, 50257, device=meta)
    calls = {
        "v": (aten.embedding.default, (weight, tokens)),
        "j": (aten.mm.default, (rows, weight.t())),
        "d1": (aten._log_softmax.default, (logits, 1, False)),
        "i": (aten.mm.default, (logits.t(), rows)),
    }
    for factor, (target, args) in calls.items():
        call = make_call_of(target, args)
        found = {s.text: s for s in strategies(rule_for(call), call.operands, (4,))}
        assert found[factor].num_splits == pytest.approx(4, rel=1e-4)
    at_rest = {choice.rest for choice in parameter_choices(((50257,), (768,)), (4,))}
    assert (0,) in at_rest and local_share(((50257,), (768,)), (0,), (4,)) == 12565 / 50257


def make_call_of(target: Any, args: tuple[Any, ...]) -> Call:
    """The signature of a call on tensors without values."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    numbers = iter(range(len(tensors)))
    result = target(*args)
    return Call(
        target=target,
        args=tuple(Slot(next(numbers)) if isinstance(a, torch.Tensor) else a for a in args),
        kwargs=(),
        operands=tuple(raw_dims(tuple(t.shape)) for t in tensors),
        dtypes=tuple(t.dtype for t in tensors),
        results=(TensorMeta(tuple(result.shape), result.dtype),),
        same=tuple(range(len(tensors))),
    )


def test_values_cross_stages_between_uneven_layouts_of_two_and_four() -> None:
    case = zoo_case("uneven gpt2")
    plan = random_plan(case.graph, [(2,), (4,)], random.Random(1))
    lowered = lower_plan(case.graph, plan)
    meshes = [stage.mesh.axis_sizes for stage in lowered.stages]
    assert any(
        is_uneven(t.dims, t.source_layout, meshes[t.source_stage])
        and is_uneven(t.dims, t.target_layout, meshes[t.target_stage])
        for t in lowered.transfers
    )
    run = VirtualRun(lowered, case.graph, case.parameters, case.buffers)
    run.attach(lambda shards: torch.optim.SGD(shards, lr=0.1))
    want = expected_step(case, seed=SEED)
    got = run.step(case.leaves, SEED)
    assert torch.allclose(got.loss, want.loss, rtol=1e-10)
    error, worst = worst_error(got.gradients, want.gradients)
    assert error <= 1e-8, worst
    run.update()
    moved = {n: case.parameters[n] - 0.1 * g for n, g in want.gradients.items()}
    error, worst = worst_error({n: run.parameters()[n] for n in moved}, moved)
    assert error <= 1e-8, worst


def test_rows_of_an_odd_batch_on_each_rank() -> None:
    """Two microbatches of seven rows on four devices: 2, 2, 2 and 1; their own rows suffice."""
    case = zoo_case("uneven images")
    plan = random_plan(case.graph, [(4,)], random.Random(0))
    (stage,) = plan.stages
    rows = dict.fromkeys(stage.inputs, "S0")
    (lowered,) = lower_plan(case.graph, replace(plan, stages=(replace(stage, inputs=rows),))).stages
    found = []
    for rank in range(4):
        data = data_shard(case.graph, [lowered], rank, 2)
        found.append(data.per_microbatch)
        feeds = [data.feed(batch) for batch in (case.batch, data.select(case.batch))]
        coords = lowered.mesh.coordinates(rank)
        for name, port in lowered.forward.inputs.items():
            if name in data.sliced:
                whole, own = (feed.part(name, port, lowered.mesh, coords, 1) for feed in feeds)
                assert len(whole) == 2 and torch.equal(whole, own)
    assert found == [(0, 1), (2, 3), (4, 5), (6,)]
