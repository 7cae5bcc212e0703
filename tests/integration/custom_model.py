"""A model with an operator of its own, whose gradient is another one; importable by processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op, register_autograd


@custom_op("custom::glow", mutates_args=())
def glow(x: Tensor, weight: Tensor) -> Tensor:
    """[.., d], [d] -> [.., d]"""
    return torch.tanh(x) * weight


@custom_op("custom::glow_backward", mutates_args=())
def glow_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    bent = torch.tanh(x)
    return grad * weight * (1 - bent**2), (grad * bent).flatten(0, -2).sum(0)


@glow.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@glow_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.custom.glow_backward(grad, *ctx.saved_tensors)


register_autograd("custom::glow", _gradient, setup_context=_save)


class Glowing(nn.Module):
    """Two layers of linear, glow."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.weights = nn.ParameterList(torch.rand(width) + 0.5 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for linear, weight in zip(self.linears, self.weights, strict=True):
            y = torch.ops.custom.glow(linear(y), weight)
        return (y - x).square().mean()


def load() -> tuple[nn.Module, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Glowing(), (torch.randn(16, 8, 64),)
