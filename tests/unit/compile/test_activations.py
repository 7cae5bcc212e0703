"""GELU as a compiler gets it is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.kernels import decompositions

aten = torch.ops.aten


def both(x: Tensor, grad: Tensor, approximate: str) -> list[Tensor]:
    return [
        aten.gelu.default(x, approximate=approximate),
        aten.gelu_backward.default(grad, x, approximate=approximate),
    ]


def decomposed(x: Tensor, grad: Tensor, approximate: str) -> list[Tensor]:
    def body(x: Tensor, grad: Tensor) -> list[Tensor]:
        return both(x, grad, approximate)

    module = make_fx(body, decomposition_table=decompositions([]), tracing_mode="fake")(x, grad)
    targets = {node.target for node in module.graph.nodes}
    assert targets.isdisjoint([aten.gelu.default, aten.gelu_backward.default, aten.tanh.default])
    made: list[Tensor] = module(x, grad)
    return made


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gelu(approximate: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -0.0, 0.0, 1e4])]).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    for got, want in zip(decomposed(x, grad, approximate), both(x, grad, approximate), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_small_values_are_closer_to_the_formula_than_torch_is() -> None:
    x = torch.linspace(-5, -2, 2001)
    grad = torch.ones_like(x)
    exact = both(x.double(), grad.double(), "tanh")
    ours, torchs = decomposed(x, grad, "tanh"), both(x, grad, "tanh")
    for got, other, want in zip(ours, torchs, exact, strict=True):
        error = ((got - want) / want).abs().max()
        assert error < 1e-5
        assert error < ((other - want) / want).abs().max()
