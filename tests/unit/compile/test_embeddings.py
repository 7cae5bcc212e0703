"""Gradients of embeddings as a compiler gets them are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.embeddings import CROWDED
from autopar.compile.kernels import decompositions

aten = torch.ops.aten


def traced(grad: Tensor, indices: Tensor, rows: int, *rest: Any) -> fx.GraphModule:
    def body(grad: Tensor, indices: Tensor) -> Tensor:
        return aten.embedding_dense_backward.default(grad, indices, rows, *rest)

    module: fx.GraphModule = make_fx(
        body, decomposition_table=decompositions([]), tracing_mode="fake"
    )(grad, indices)
    return module


def has_atomics(module: fx.GraphModule) -> bool:
    return any("index_put" in str(node.target) for node in module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [-1, 1])
def test_a_few_rows_are_summed(dtype: torch.dtype, padding: int) -> None:
    """Of a gradient as it is, and of one that lies in memory with its last dim first."""
    indices = torch.randint(0, 3, (4, CROWDED))
    for grad in (torch.randn(4, CROWDED, 5), torch.randn(5, 4, CROWDED).permute(1, 2, 0)):
        args = (grad.to(dtype), indices, 3, padding, False)
        module = traced(*args)
        assert not has_atomics(module)
        got, want = module(*args[:2]), aten.embedding_dense_backward(*args)
        assert got.dtype == dtype
        exact = aten.embedding_dense_backward(grad.double(), *args[1:])
        error, torchs = ((x - exact).abs().max() for x in (got, want))
        assert error <= max(torchs, 1e-6 if dtype == torch.float32 else 0), (error, torchs)


@pytest.mark.parametrize(
    ("rows", "count", "by_frequency"),
    [(3, 3 * CROWDED - 1, False), (100, 100 * CROWDED, False), (3, 3 * CROWDED, True)],
)
def test_other_tables_stay(rows: int, count: int, by_frequency: bool) -> None:
    grad, indices = torch.randn(count, 1), torch.randint(0, rows, (count,))
    module = traced(grad, indices, rows, -1, by_frequency)
    assert has_atomics(module)
    want = aten.embedding_dense_backward(grad, indices, rows, -1, by_frequency)
    torch.testing.assert_close(module(grad, indices), want, rtol=1e-4, atol=1e-4)
