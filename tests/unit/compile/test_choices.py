"""Products get the kernels that were chosen for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile import choices
from autopar.compile.choices import choose_kernels
from autopar.compile.inductor import compile_module
from autopar.ops.cublaslt import Epilogue, Problem

aten, own = torch.ops.aten, torch.ops.autopar
CHOSEN = own.product.default


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4), (4, 8), (8,), (6, 8)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def problem(a: Tensor, b: Tensor, epilogue: Epilogue, dtype: torch.dtype | None = None) -> Problem:
    sizes = (*a.shape, b.shape[1])
    return Problem(0, a.dtype, dtype or a.dtype, *sizes, (False, False), (4, 8), epilogue, 256)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a GPU."""
    monkeypatch.setattr(choices, "problem_of", problem)
    joined = {
        own.linear_gelu.default: lambda a, b, _: problem(a, b, Epilogue.GELU),
        own.gelu_gradient.default: lambda a, b, _: problem(a, b, Epilogue.GELU_GRADIENT),
    }
    monkeypatch.setattr(choices, "_JOINED", joined)


def alone(a: Tensor, b: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return aten.mm.default(a, b)


def in_float32(a: Tensor, b: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return own.wide_product.default(a, b, torch.float32)


def with_bias(a: Tensor, b: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Read by a product, which is not elementwise."""
    return aten.mm.default(
        aten.add.Tensor(aten.mm.default(a, b), bias), aten.permute.default(x, [1, 0])
    )


def with_fused_bias(a: Tensor, b: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    total = aten.view.default(aten.add.Tensor(aten.mm.default(a, b), bias), [2, 3, 8])
    return aten.add.Tensor(total, aten.view.default(x, [2, 3, 8]))


def with_matrix(a: Tensor, b: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return aten.mm.default(
        aten.add.Tensor(aten.mm.default(a, b), x), aten.permute.default(x, [1, 0])
    )


def activated(a: Tensor, b: Tensor, bias: Tensor, x: Tensor) -> list[Tensor]:
    return [*own.linear_gelu.default(a, b, bias, 0), own.gelu_gradient.default(a, b, x, 0)]


Body = Callable[..., Any]


def graph_of(body: Body) -> fx.GraphModule:
    graph: fx.GraphModule = make_fx(body, tracing_mode="fake")(*matrices())
    return graph


def chosen(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    """dtype and kernel of each product."""
    nodes = graph.graph.find_nodes(op="call_function", target=CHOSEN)
    return [node.args[2:] for node in nodes]


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize(
    ("body", "count"),
    [
        (alone, 1),
        (in_float32, 1),
        (with_bias, 1),  # the last product: Inductor makes the sum in the first one's kernel
        (with_matrix, 1),
        (with_fused_bias, 1),
    ],
)
def test_products_are_replaced(body: Body, count: int) -> None:
    graph = choose_kernels(graph_of(body), lambda _: 2)
    assert chosen(graph) == [(torch.float32, 2)] * count
    want = body(*matrices())
    torch.testing.assert_close(graph(*matrices()), want)
    results = graph.graph.output_node()
    results.args = ((results.args[0],),)
    (got,) = compile_module(graph).call([*matrices()])
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("problems")
def test_activations_are_told() -> None:
    asked = []

    def choose(problem: Problem) -> int:
        asked.append(problem.epilogue)
        return len(asked)

    graph = choose_kernels(graph_of(activated), choose)
    kernels = [node.args[3] for node in graph.graph.nodes if node.target in choices._JOINED]
    assert kernels == [1, 2] and asked == [Epilogue.GELU, Epilogue.GELU_GRADIENT]
    torch.testing.assert_close(graph(*matrices()), activated(*matrices()))


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("body", [alone, with_bias, activated])
def test_what_the_heuristic_knows_stays(body: Body) -> None:
    before = graph_of(body)
    want = [(node.target, node.args) for node in before.graph.nodes]
    after = choose_kernels(before, lambda _: 0)
    assert [(node.target, node.args) for node in after.graph.nodes] == want


def test_a_cpu_is_not_asked() -> None:
    def never(problem: Problem) -> int:
        raise AssertionError(problem)

    assert not chosen(choose_kernels(graph_of(alone), never))
