"""Training in bfloat16 with float32 parameters: plans, programs, and what the user sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.api import parallelize, plan_model
from autopar.graph.precision import Precision
from autopar.graph.program import refs_in
from autopar.lowering.lower import lower_plan
from autopar.lowering.program import Communicate, LocalProgram
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.verify import verify_plan
from cost_models import Cluster
from tests.golden.update import Mlp
from tests.zoo import ZOO

FAST_LINKS = Path(__file__).parent.parent / "clusters" / "fast_links.toml"


def plan_of(name: str, precision: str, **options: Any) -> ParallelPlan:
    """A plan on four devices that are quick to talk."""
    cluster, module_and_batch = Cluster.from_toml(FAST_LINKS), ZOO[name]()
    wanted = SearchOptions(num_microbatches=2, **options)
    kind = Precision.parse(precision)
    return plan_model(*module_and_batch, cluster, precision=kind, options=wanted)[0]


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "float64"), ("wide_resnet", "float32")])
def test_two_stages_of_two(name: str, dtype: str) -> None:
    """float64: the same program as the user's model in float64. float32: bfloat16 as it is, no
    further from the float64 step than one device is."""
    plan = plan_of(name, "bf16", num_stages=2, mesh_shape=(2,))
    module, batch = ZOO[name]()
    report = verify_plan(module, batch, plan, dtype=dtype)
    assert report.ok and report.narrow == (dtype == "float32"), report


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.float32), ("bf16/bf16", torch.bfloat16)]
)
def test_gradients_cross_the_network_in_the_policys_type(
    precision: str, dtype: torch.dtype
) -> None:
    """Sums over 16 microbatches, reduced once; weights are gathered in bfloat16."""
    with torch.device("meta"):
        model, x = Mlp(1024, 4096), torch.empty(16 * 8192, 1024)
    rest = {"up.weight": "S0", "down.weight": "S0"}
    options = SearchOptions(num_stages=1, num_microbatches=16, placements=rest)
    cluster, kind = Cluster.parse("h100:1x2"), Precision.parse(precision)
    plan, graph = plan_model(model, (x,), cluster, precision=kind, options=options)
    stage = lower_plan(graph, plan).stages[0]
    assert sent_types(stage.reduce) == {dtype}
    assert sent_types(stage.gather) == {torch.bfloat16}
    assert {port.meta.dtype for port in stage.reduce.outputs.values()} == {torch.float32}


def sent_types(program: LocalProgram) -> set[torch.dtype]:
    """Of what a program's collectives move."""
    types = {port.ref.name: port.meta.dtype for port in program.inputs.values()}
    sent = set()
    for instruction in program.body:
        if isinstance(instruction, Communicate):
            types[instruction.name] = types[instruction.operand.name]
            sent.add(types[instruction.name])
        else:
            source = types[refs_in(instruction.args)[0].name]
            types[instruction.name] = instruction.kwargs.get("dtype") or source
    return sent


def test_the_optimizer_sees_float32() -> None:
    module, batch = ZOO["gpt2"]()
    cluster = Cluster.parse("cpu:1x1")
    parallel = parallelize(module, batch, cluster=cluster, precision=Precision.parse("bf16"))
    loss = parallel.train_step(batch)
    assert torch.isfinite(loss)
    for name, parameter in parallel.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def test_narrow_steps_save_less() -> None:
    wide = plan_of("gpt2", "model", num_stages=1, mesh_shape=(4,))
    narrow = plan_of("gpt2", "bf16", num_stages=1, mesh_shape=(4,))
    assert narrow.precision == "bf16/fp32" and wide.precision == "model"
    assert narrow.stages[0].prediction.saved_bytes < 0.75 * wide.stages[0].prediction.saved_bytes
