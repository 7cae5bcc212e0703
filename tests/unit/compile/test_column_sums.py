"""Sums over the rows of what a product reads are made in blocks: the values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopar.compile import column_sums
from autopar.compile.column_sums import sum_in_blocks
from tests.unit.compile.inductor_memory import moved_bytes
from tests.unit.compile.test_passes import traced

aten = torch.ops.aten

BATCH, SEQUENCE, HEADS, WIDTH = 3, 16, 2, 4
ROWS, COLUMNS = BATCH * SEQUENCE, HEADS * WIDTH
Body = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_sums, "SMALL", ROWS * COLUMNS)
    monkeypatch.setattr(column_sums, "ROWS", 8)
    monkeypatch.setattr(column_sums, "LEAST_ROWS", 4)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def packed(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> list[Tensor]:
    """Backward of a layer for queries, keys and values of attention: gradients of its weight, its
    bias and its input."""
    rows = [g.transpose(1, 2).reshape(BATCH, SEQUENCE, -1) for g in (q, k, v)]
    dy = torch.cat(rows, -1).view(ROWS, -1)
    return [dy.t() @ x, dy.sum(0, keepdim=True).view(-1), dy @ dy.t()]


def bent(dz: Tensor, y: Tensor, x: Tensor) -> list[Tensor]:
    """The same behind a GELU."""
    dy = aten.gelu_backward(dz, y, approximate="tanh").to(x.dtype).view(ROWS, -1)
    return [dy.t() @ x, dy.sum(0), dy @ dy.t()]


def heads(dtype: torch.dtype) -> list[Tensor]:
    g = values(3, BATCH, SEQUENCE, HEADS, WIDTH, dtype=dtype)
    return [*g.transpose(2, 3), values(ROWS, 5, dtype=dtype)]


def activations(dtype: torch.dtype) -> list[Tensor]:
    g = values(2, BATCH, SEQUENCE, COLUMNS, dtype=dtype)
    return [*g, values(ROWS, 5, dtype=dtype)]


def sums(module: fx.GraphModule) -> list[tuple[int, ...]]:
    nodes = module.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    return [tuple(n.meta["val"].shape) for n in nodes]


CASES: list[Any] = [(packed, heads), (bent, activations)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("body", "inputs"), CASES)
def test_sums_are_of_blocks(body: Body, inputs: Any, dtype: torch.dtype) -> None:
    """Those of wider values than they are of, rounded once, as before."""
    given = inputs(dtype)
    module = sum_in_blocks(traced(body, *given))
    module.graph.lint()
    module.recompile()
    blocks = ROWS // 8
    assert sums(module)[0][0] == blocks
    assert len(sums(module)) == 2
    (buffer,) = module.graph.find_nodes(op="call_function", target=aten.as_strided.default)
    assert tuple(buffer.meta["val"].shape[:2]) == (blocks, 8)
    for got, want in zip(module(*given), body(*given), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)
    summed, exact = module(*given)[1], body(*(g.double() for g in given))[1]
    if dtype == torch.bfloat16 and body is packed:
        torch.testing.assert_close(summed, exact.to(dtype), rtol=2**-8, atol=1e-6)


def test_other_sums_stay() -> None:
    """Of what no product reads, of rows in odd numbers, of few elements, over other dims, of what
    a kernel along rows makes, and of what the rows of operands do not make."""
    x, w = values(ROWS, COLUMNS), values(COLUMNS, 5)
    bodies: list[Body] = [
        lambda x, w: [x.exp().sum(0)],
        lambda x, w: [(y := x[1:].exp()) @ w, y.sum(0)],
        lambda x, w: [(y := x[:, :4].exp()) @ w[:4], y.sum(0)],
        lambda x, w: [(y := x.exp()) @ w, y.sum(1)],
        lambda x, w: [(y := x * x.sum(1, keepdim=True)) @ w, y.sum(0)],
        lambda x, w: [(y := x * x[0]) @ w, y.sum(0)],
        lambda x, w: [(y := torch.cat([x, x])) @ w, y.sum(0)],
        lambda x, w: [x @ w, x.sum(0)],
    ]
    for body in bodies:
        module = sum_in_blocks(traced(body, x, w))
        assert aten.as_strided.default not in [node.target for node in module.graph.nodes]


@pytest.mark.parametrize(("body", "inputs"), CASES)
def test_what_is_summed_is_not_read_again(body: Body, inputs: Any) -> None:
    given = inputs(torch.bfloat16)
    before, after = traced(body, *given), sum_in_blocks(traced(body, *given))
    saved = moved_bytes(before) - moved_bytes(after)
    rows = 3 * COLUMNS if body is packed else COLUMNS
    assert saved == ROWS * rows * 2 - 2 * (ROWS // 8) * rows * 4  # sums of blocks come and go
