"""Operators that autopar has no rule for, as a user would define them."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.library import custom_op


@custom_op("found::mix", mutates_args=())
def mix(x: Tensor, w: Tensor) -> Tensor:
    """[b, i, k], [k, j] -> [b, i, j]: a matmul by another name."""
    return x @ w


@custom_op("found::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pointwise, two results; linear in x."""
    return x * torch.sigmoid(y), torch.sigmoid(y)


@custom_op("found::gated", mutates_args=())
def gated(x: Tensor, y: Tensor) -> Tensor:
    """Broadcasts; linear in x."""
    return x * torch.sigmoid(y)


@custom_op("found::normalise", mutates_args=())
def normalise(x: Tensor) -> Tensor:
    """Over the last dim."""
    return torch.softmax(x, -1)


@custom_op("found::clamp", mutates_args=())
def clamp(x: Tensor) -> Tensor:
    """Linear for small numbers only."""
    return x.clamp(-100, 100)


@custom_op("found::shift", mutates_args=())
def shift(x: Tensor) -> Tensor:
    """Every row reads its neighbour."""
    return torch.roll(x, 1, 0)


@custom_op("found::square", mutates_args=())
def square(x: Tensor, y: Tensor) -> Tensor:
    """All sizes equal: [n, n], [n, n] -> [n, n], transposed."""
    return (x @ y).t().contiguous()


@custom_op("found::pick", mutates_args=())
def pick(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


@custom_op("found::count", mutates_args=())
def count(x: Tensor) -> Tensor:
    """Integers: no sum of them is ever pending."""
    return (x > 0).sum(0)


@custom_op("found::heads", mutates_args=())
def heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, h * d]: each head is centred."""
    parts = x.unflatten(-1, (num_heads, -1))
    return (parts - parts.mean(-1, keepdim=True)).flatten(-2)


@custom_op("found::padded", mutates_args=())
def padded(x: Tensor, length: int) -> Tensor:
    """Its constant is a size."""
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[0])) + length


@custom_op("found::boxes", mutates_args=())
def boxes(x: Tensor) -> Tensor:
    """[n, 4] only."""
    if x.shape[1] != 4:
        raise ValueError("a box has four numbers")
    return (x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1])


@custom_op("found::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


@custom_op("found::zero", mutates_args=())
def zero(x: Tensor) -> Tensor:
    return x * 0


@custom_op("found::cuda_only", mutates_args=(), device_types="cuda")
def cuda_only(x: Tensor) -> Tensor:
    return x + 1


@custom_op("found::crash", mutates_args=())
def crash(x: Tensor) -> Tensor:
    if x.shape[0] != 5:
        os.abort()
    return x + 1


@custom_op("found::single", mutates_args=())
def single(x: Tensor) -> Tensor:
    """float32 only."""
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return x.cumsum(1) * 2


@custom_op("found::joined", mutates_args=())
def joined(parts: list[Tensor], scale: Tensor) -> Tensor:
    """[b, i] and [b, j] side by side, times a number."""
    return torch.cat(parts, 1) * scale
