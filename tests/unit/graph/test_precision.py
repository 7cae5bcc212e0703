"""A float64 twin of a graph: every float widened, everything else as it was."""

from __future__ import annotations

from dataclasses import replace

import torch

from autopar.graph.precision import in_float64
from autopar.graph.program import Graph, GraphInput, InputKind, Operator, Phase, Ref, TensorMeta

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
