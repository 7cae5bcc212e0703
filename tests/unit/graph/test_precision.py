"""Precisions: narrow compute around float32 parameters, and the float64 twin of a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.errors import OptionError
from autopar.graph.capture import capture_graph
from autopar.graph.precision import Precision, in_float64, reduced_after
from autopar.graph.program import (
    Graph,
    GraphInput,
    InputKind,
    Operator,
    OutputKind,
    Phase,
    Ref,
    TensorMeta,
)

aten = torch.ops.aten


def half_graph() -> Graph:
    x = GraphInput("x", InputKind.PARAMETER, TensorMeta((2,), torch.bfloat16), "x", "x")
    i = GraphInput("i", InputKind.BATCH, TensorMeta((2,), torch.int64), "i")
    c = GraphInput("c", InputKind.CONSTANT, TensorMeta((2,), torch.float16), "c")
    cast = Operator(
        "cast",
        aten._to_copy.default,
        (Ref("x"),),
        {"dtype": torch.float32},
        (TensorMeta((2,), torch.float32),),
        Phase.FORWARD,
    )
    mask = replace(
        cast,
        name="mask",
        args=(Ref("i"),),
        kwargs={"dtype": torch.bool},
        results=(TensorMeta((2,), torch.bool), None),
    )
    constants = {"c": torch.ones(2, dtype=torch.float16)}
    return Graph((x, i, c), (cast, mask), (), constants)


def test_floats_are_widened_and_nothing_else() -> None:
    wide = in_float64(half_graph())
    assert [i.meta.dtype for i in wide.inputs] == [torch.float64, torch.int64, torch.float64]
    cast, mask = wide.operators
    assert cast.kwargs["dtype"] is torch.float64 and cast.results[0] is not None
    assert cast.results[0].dtype is torch.float64 and cast.args == (Ref("x"),)
    assert mask.kwargs["dtype"] is torch.bool and mask.results[1] is None
    assert wide.constants["c"].dtype is torch.float64


def test_twice_is_once() -> None:
    once = in_float64(half_graph())
    assert in_float64(once).fingerprint() == once.fingerprint() != half_graph().fingerprint()


class Normed(nn.Module):
    """A frozen convolution, BatchNorm, a linear layer; the loss function gets float32 targets."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 1, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor, _target: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(image)).mean((2, 3)))


def normed_graph(precision: str) -> Graph:
    batch = (torch.randn(4, 3, 2, 2), torch.randn(4, 2))

    def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.mse_loss(outputs.float(), batch[1])

    return capture_graph(Normed(), batch, loss, Precision.parse(precision))


@pytest.mark.parametrize("text", ["model", "fp32/fp32", "bf16/fp32", "bf16/bf16"])
def test_text(text: str) -> None:
    assert str(Precision.parse(text)) == text
    assert Precision.parse("bf16") == Precision(torch.bfloat16, torch.float32)


@pytest.mark.parametrize("text", ["fp16", "bf16/fp16", "bfloat16", ""])
def test_what_is_no_precision_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="bf16"):
        Precision.parse(text)
    with pytest.raises(OptionError, match="loss scaling"):
        Precision(torch.float16)


def test_compute_is_narrow_and_parameters_are_not() -> None:
    inputs = {i.target: i for i in normed_graph("bf16").inputs_of(InputKind.PARAMETER)}
    head, norm, frozen = (inputs[f"{n}.weight"] for n in ("head", "norm", "frozen"))
    assert (head.meta.dtype, head.rest_meta.dtype) == (torch.bfloat16, torch.float32)
    assert (norm.meta.dtype, norm.rest) == (torch.float32, None)
    assert (frozen.meta.dtype, frozen.rest) == (torch.bfloat16, torch.float32)
    batch = normed_graph("bf16").inputs_of(InputKind.BATCH)
    assert {i.meta.dtype for i in batch} == {torch.float32}


def test_gradients_are_float32() -> None:
    graph = normed_graph("bf16")
    metas = graph.metas()
    assert {metas[o.ref].dtype for o in graph.outputs_of(OutputKind.GRADIENT)} == {torch.float32}


def test_only_a_narrow_reduction_comes_before_the_cast() -> None:
    assert len(reduced_after(normed_graph("bf16"))) == 2  # head's weight and bias
    assert not reduced_after(normed_graph("bf16/bf16"))
    assert not reduced_after(normed_graph("model"))


def test_as_built_is_the_same_graph() -> None:
    assert normed_graph("fp32").fingerprint() == normed_graph("model").fingerprint()
    fingerprints = {normed_graph(p).fingerprint() for p in ("model", "bf16", "bf16/bf16")}
    assert len(fingerprints) == 3
