"""Gradients of weights leave their product in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autopar.compile import alignment
from autopar.compile.gradients import widen_gradients
from autopar.compile.inductor import compile_module
from autopar.compile.passes import prepare
from tests.unit.compile.test_passes import aten, convert, targets, traced

own = torch.ops.autopar
WIDE = own.wide_product.default


def linear(x: Tensor, dy: Tensor) -> list[Tensor]:
    return [(dy.T @ x).float()]


def experts(x: Tensor, dy: Tensor) -> list[Tensor]:
    x, dy = x.reshape(4, -1, x.shape[1]), dy.reshape(4, -1, dy.shape[1])
    gradient = (x.mT @ dy).reshape(4, x.shape[2], 1, dy.shape[2])
    return [gradient.permute(0, 2, 1, 3).float().reshape(4, x.shape[2], dy.shape[2])]


def rows_of_more(x: Tensor, dy: Tensor) -> list[Tensor]:
    return [(dy.T @ x)[:5].float()]


def examples(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(64, n, generator=generator).to(dtype) for n in (16, 8))
    return x, dy


@pytest.mark.parametrize("body", [linear, experts, rows_of_more])
def test_a_gradient_is_not_rounded(body: Callable[..., list[Tensor]]) -> None:
    graph = widen_gradients(traced(body, *examples()))
    graph.graph.eliminate_dead_code()
    assert WIDE in targets(graph) and convert not in targets(graph)
    (got,), (want,) = graph(*examples()), body(*(x.double() for x in examples()))
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    (made,) = graph.graph.output_node().args[0]
    assert made.meta["val"].dtype is torch.float32 and made.meta["val"].shape == got.shape
    compiled = compile_module(graph)
    assert compiled.results[0].strides == got.stride()
    torch.testing.assert_close(compiled.call(list(examples()))[0], got)


def read_twice(x: Tensor, dy: Tensor) -> list[Tensor]:
    gradient = dy.T @ x
    return [gradient.float(), gradient.float().sum()]


def read_before(x: Tensor, dy: Tensor) -> list[Tensor]:
    return [(dy.T @ x).float().exp()]


def transposed(x: Tensor, dy: Tensor) -> list[Tensor]:
    return [(dy.T @ x).T.float()]


def added(x: Tensor, dy: Tensor) -> list[Tensor]:
    return [(dy.T @ x + 1).float()]


@pytest.mark.parametrize("body", [read_twice, read_before, transposed, added])
def test_what_is_no_gradient_stays(body: Callable[..., list[Tensor]]) -> None:
    assert WIDE not in targets(widen_gradients(traced(body, *examples())))


def test_wide_gradients_stay() -> None:
    assert WIDE not in targets(widen_gradients(traced(linear, *examples(torch.float32))))


def test_padded_products_are_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "SMALL_PRODUCT", 1)
    x, dy = examples()
    dy = dy[:, :7].contiguous()
    graph: fx.GraphModule = prepare(traced(linear, x, dy), [])
    assert WIDE in targets(graph) and aten.constant_pad_nd.default in targets(graph)
    (want,) = linear(x.double(), dy.double())
    torch.testing.assert_close(graph(x, dy)[0], want.float(), rtol=1e-5, atol=1e-5)
