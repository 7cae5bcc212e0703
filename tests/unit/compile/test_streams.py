"""Sums in the products that make what is added: where they are joined, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile import streams
from autopar.compile.inductor import compile_module
from autopar.compile.passes import prepare
from autopar.compile.streams import join_streams
from autopar.compile.tables import make_sums

aten, own = torch.ops.aten, torch.ops.autopar
JOINED = own.linear_add.default
SHAPE = BATCH, LENGTH, WIDTH = 2, 3, 4
ROWS = BATCH * LENGTH

Body = Callable[..., list[Tensor]]


def inputs() -> list[Tensor]:
    """A stream [.., WIDTH], a matrix, two weights and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPE, (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    product = aten.mm.default(a, b)
    return product if bias is None else aten.add.Tensor(product, bias)


def read_twice(total: Tensor, weight: Tensor) -> list[Tensor]:
    """Before a product and after it, by elementwise operators."""
    later = aten.mm.default(aten.relu.default(aten.view.default(total, [ROWS, WIDTH])), weight)
    return [aten.add.Tensor(total, aten.view.default(later, list(SHAPE)))]


def shaped(value: Tensor) -> Tensor:
    return aten.view.default(value, list(SHAPE))


def plain(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return read_twice(aten.add.Tensor(x, shaped(linear(a, b))), w)


def with_bias(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return read_twice(aten.add.Tensor(x, shaped(linear(a, b, bias))), w)


def with_bias_last(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return read_twice(aten.add.Tensor(x, aten.add.Tensor(shaped(linear(a, b)), bias)), w)


def cloned(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    """As dropout with a probability of zero does."""
    return read_twice(aten.add.Tensor(x, aten.clone.default(shaped(linear(a, b, bias)))), w)


def stream_last(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return read_twice(aten.add.Tensor(shaped(linear(a, b, bias)), x), w)


def two_layers(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    (middle,) = plain(x, a, b, w, bias)
    return read_twice(middle, b)


def read_once(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return [aten.relu.default(aten.add.Tensor(x, shaped(linear(a, b))))]


def returned(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    product = linear(a, b)
    return [*read_twice(aten.add.Tensor(x, shaped(product)), w), product]


def scaled(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return read_twice(aten.add.Tensor(x, shaped(linear(a, b)), alpha=2), w)


def scaled_bias(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    total = aten.add.Tensor(linear(a, b), bias, alpha=2)
    return read_twice(aten.add.Tensor(x, shaped(total)), w)


def of_other_columns(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    """The bias is of the columns of another shape than the product's."""
    long = aten.view.default(linear(a, b), [-1, 2])
    total = aten.add.Tensor(long, aten.view.default(bias, [2, 2])[0])
    return read_twice(aten.add.Tensor(x, shaped(total)), w)


def made_later(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    """What is added to is there after the product alone."""
    product, stream = shaped(linear(a, b)), shaped(linear(a, w))
    return read_twice(aten.add.Tensor(stream, product), w)


def never_in_memory(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    return read_twice(aten.add.Tensor(aten.relu.default(x), shaped(linear(a, b))), w)


def graph_of(body: Body) -> fx.GraphModule:
    graph: fx.GraphModule = make_fx(body, tracing_mode="fake")(*inputs())
    return graph


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """As if this were a GPU: operands of the kernels that were asked for."""
    asked: list[tuple[Any, ...]] = []

    def problem(*operands: Any) -> object:
        asked.append(operands)
        return object()

    monkeypatch.setattr(streams, "linear_add_problem", problem)
    return asked


def joined(graph: fx.GraphModule) -> list[fx.Node]:
    found: list[fx.Node] = graph.graph.find_nodes(op="call_function", target=JOINED)
    return found


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("body", "count"),
    [
        (plain, 1),
        (with_bias, 1),
        (with_bias_last, 1),
        (cloned, 1),
        (stream_last, 1),
        (two_layers, 2),
        (made_later, 1),  # the later product adds to the earlier one
        (read_once, 0),  # no buffer: the sum is made where it is read
        (returned, 0),
        (of_other_columns, 0),
        (never_in_memory, 0),
    ],
)
def test_what_is_joined(body: Body, count: int) -> None:
    graph = join_streams(make_sums(graph_of(body)))
    assert len(joined(graph)) == count
    graph.graph.lint()
    want = body(*inputs())
    torch.testing.assert_close(graph(*inputs()), want)
    compiled = compile_module(prepare(graph_of(body), []))
    torch.testing.assert_close(list(compiled.call([*inputs()])), want)


@pytest.mark.parametrize("body", [scaled, scaled_bias])
def test_a_factor_is_not_lost(body: Body, kernels: list[tuple[Any, ...]]) -> None:
    assert not joined(join_streams(make_sums(graph_of(body)))) and not kernels


def test_the_product_stays_where_it_was(kernels: list[tuple[Any, ...]]) -> None:
    """Later it would hold its weight, and what comes in the weight's memory, for longer."""

    def body(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
        product, beside = linear(a, b), aten.mm.default(a, w)
        return [*read_twice(aten.add.Tensor(x, shaped(product)), w), beside]

    graph = join_streams(make_sums(graph_of(body)))
    products = [n.target for n in graph.graph.nodes if n.target in (JOINED, aten.mm.default)]
    assert products == [JOINED, aten.mm.default, aten.mm.default]
    (operands,) = kernels
    assert [x is None for x in operands] == [False, False, True, False]


def test_other_types_stay(kernels: list[tuple[Any, ...]]) -> None:
    """A product that was rounded and widened is another value."""

    def body(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
        narrow = linear(a.bfloat16(), b.bfloat16())
        return read_twice(aten.add.Tensor(x, shaped(narrow.float())), w)

    assert not joined(join_streams(make_sums(graph_of(body)))) and not kernels


def test_nothing_changes_without_a_kernel() -> None:
    assert not joined(join_streams(make_sums(graph_of(with_bias))))
