"""A call made by hand, and the tensors to make it with: float64, the same ones every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class Case(NamedTuple):
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, t.shape)) for t in self.args if isinstance(t, Tensor))
        return f"{self.target}-{shapes}".removeprefix("aten.")


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, seed: int = 0) -> Tensor:
    """In (0.1, 0.9)."""
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1


def ints(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def bools(*shape: int, seed: int = 0) -> Tensor:
    return ints(2, *shape, seed=seed).bool()
