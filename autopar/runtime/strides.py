"""Tensors in the strides that somebody else has to see."""

from __future__ import annotations

import torch
from torch import Tensor


def with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A view where only dims of size 1 differ, whose strides mean nothing; else a copy."""
    if value.stride() == strides:
        return value
    if same_strides(value, strides):
        return value.as_strided(value.shape, strides)
    copy = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return copy.copy_(value)


def same_strides(value: Tensor, strides: tuple[int, ...]) -> bool:
    """But for dims of size 1."""
    own = value.stride()
    return all(s == t or n == 1 for n, s, t in zip(value.shape, own, strides, strict=True))
