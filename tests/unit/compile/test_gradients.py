"""Gradients of weights leave their product in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autopar.compile import alignment
from autopar.compile.gradients import leave_narrow, widen_gradients
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


SAME = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


def images(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 6, 6), (2, 4, 6, 6), (4, 8, 3, 3))
    x, dy, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    last = torch.channels_last
    return tuple(t.to(memory_format=last) for t in (x, dy, weight))  # type: ignore[return-value]


def weights(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight of a convolution from 8 channels to 4."""
    mask = [False, True, False]
    made: Tensor = aten.convolution_backward(dy, x, weight, None, *SAME, mask)[1]
    return made


def a_convolution(x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
    dweight = weights(x, dy, weight)
    return [x.float(), dweight.contiguous().float()]


def in_its_order(x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
    return [x.float(), weights(x, dy, weight).float()]


@pytest.mark.parametrize("body", [a_convolution, in_its_order])
def test_a_convolutions_gradient_is_not_widened(body: Callable[..., list[Tensor]]) -> None:
    want = body(*images())
    plain = traced(body, *images())
    assert targets(leave_narrow(plain, [])) == targets(traced(body, *images()))
    graph = leave_narrow(plain, [0, 1])
    assert convert in targets(graph)  # of what is no gradient
    first, made = graph(*images())
    assert made.dtype is torch.bfloat16
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, want[0]) and torch.equal(made.float(), want[1])
    (_, result) = compile_module(graph).results
    assert result.dtype is torch.bfloat16 and result.strides == made.stride()


def read_as_well(x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
    dweight = weights(x, dy, weight)
    return [dweight.sum(), dweight.contiguous().float()]


def changed(x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
    return [x, (weights(x, dy, weight) * 2).float()]


@pytest.mark.parametrize("body", [read_as_well, changed])
def test_what_is_no_convolutions_gradient_alone_stays(body: Callable[..., list[Tensor]]) -> None:
    before = targets(traced(body, *images()))
    assert targets(leave_narrow(traced(body, *images()), [0, 1])) == before


def test_gradients_in_float32_stay() -> None:
    wide = images(torch.float32)
    assert targets(leave_narrow(traced(a_convolution, *wide), [1])) == targets(
        traced(a_convolution, *wide)
    )
