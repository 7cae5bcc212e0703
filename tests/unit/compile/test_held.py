"""What a plan for compiled programs predicts to be held is what Inductor holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from autopar.api import plan_model
from autopar.compile import kernels
from autopar.compile.passes import prepare
from autopar.compile.step import whole_step
from autopar.compile.trace import trace
from autopar.graph.precision import Precision
from autopar.graph.program import Graph
from autopar.layout import local_shape
from autopar.lowering.lower import lower_plan
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from benchmarks.models import gpt, llama, wide_resnet
from cost_models import Cluster
from tests.unit.compile.inductor_memory import peak_bytes

SIZES: dict[str, Any] = {"vocab_size": 4096, "seq_len": 256}


@dataclass(frozen=True)
class Sample:
    """more: of what Inductor holds, operators that run one by one would hold at least so much."""

    config: Any
    kind: Any
    example_batch: Any
    more: float


SAMPLES = {
    "llama": Sample(
        llama.LlamaConfig(256, 896, 2, 8, 2, **SIZES), llama.Llama, llama.example_batch, 1.4
    ),
    "gpt": Sample(gpt.GPTConfig(256, 2, 8, dropout=0.0, **SIZES), gpt.GPT, gpt.example_batch, 1.2),
    "gpt with a vocabulary of an odd size": Sample(
        gpt.GPTConfig(256, 2, 8, dropout=0.0, **{**SIZES, "vocab_size": 4097}),
        gpt.GPT,
        gpt.example_batch,
        1.2,
    ),
    "wide resnet": Sample(
        wide_resnet.WideResNetConfig(64, 2, (1, 1), num_classes=16, image_size=64),
        wide_resnet.WideResNet,
        wide_resnet.example_batch,
        0.95,
    ),
}


def inductor_bytes(graph: Graph, plan: ParallelPlan) -> float:
    lowered = lower_plan(graph, plan)
    program = whole_step(lowered, 0)
    assert program is not None
    names = {p.name for p in lowered.stages[0].parameters}
    parameters = [i for i, name in enumerate(program.inputs) if name in names]
    with FakeTensorMode():
        inputs = [
            torch.empty(local_shape(p.dims, p.layout, (1,)), dtype=p.meta.dtype)
            for p in program.inputs.values()
        ]
        inputs += [torch.empty(t.shape, dtype=t.dtype) for t in program.constants.values()]
    with mock.patch.object(kernels, "has_kernel_for_rows", lambda _: True):  # as on a GPU
        traced = trace(program, inputs, coordinates=(0,), groups=[("0", 1)])
    at_rest = sum(tensor.nbytes for tensor in inputs)
    gradients = [i for i, name in enumerate(program.outputs) if name in names]
    return at_rest + peak_bytes(prepare(traced, parameters, gradients))


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_predicted_is_what_inductor_holds(name: str) -> None:
    sample = SAMPLES[name]
    with torch.device("meta"):
        model: nn.Module = sample.kind(sample.config)
        batch = sample.example_batch(sample.config, 24)
    predicted = {}
    for compiled in (False, True):
        options = SearchOptions(compiled=compiled, num_microbatches=1, cache=False)
        plan, graph = plan_model(
            model,
            batch,
            Cluster.parse("h100:1x1"),
            precision=Precision.parse("bf16/bf16"),
            options=options,
        )
        p = plan.stages[0].prediction
        predicted[compiled] = p.peak_bytes - p.optimizer_bytes
    held = inductor_bytes(graph, plan)
    assert predicted[True] == pytest.approx(held, rel=0.05)
    assert predicted[False] > sample.more * held
