"""Max-pools of many geometries, and their gradients by ATen and by ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import autopar.ops  # noqa: F401  (registers autopar::max_pool)

aten, own = torch.ops.aten, torch.ops.autopar

Pool = tuple[list[int], list[int], list[int], list[int], bool]

# kernel, stride, padding, dilation, ceil_mode; rows and columns
POOLS: list[tuple[Pool, tuple[int, int]]] = [
    (([3, 3], [2, 2], [1, 1], [1, 1], False), (12, 16)),
    (([3, 3], [2, 2], [1, 1], [1, 1], False), (11, 13)),
    (([3, 3], [2, 2], [0, 0], [1, 1], True), (10, 9)),
    (([2, 2], [2, 2], [0, 0], [1, 1], False), (8, 9)),
    (([3, 3], [1, 1], [1, 1], [1, 1], False), (5, 6)),
    (([2, 3], [3, 1], [1, 0], [1, 2], False), (9, 10)),  # rows in no window
    (([5, 4], [2, 3], [2, 2], [2, 1], True), (14, 15)),
    (([5, 5], [1, 1], [2, 2], [1, 1], False), (3, 4)),
    (([1, 1], [2, 2], [0, 0], [1, 1], False), (5, 7)),
]


def both_ways(x: Tensor, grad: Tensor, *pool: object) -> list[Tensor]:
    """Value and gradient by ATen."""
    y, indices = aten.max_pool2d_with_indices(x, *pool)
    return [y, aten.max_pool2d_with_indices_backward(grad, x, *pool, indices)]


def by_offsets(x: Tensor, grad: Tensor, *pool: object) -> list[Tensor]:
    """By ours."""
    y, offsets = own.max_pool(x, *pool)
    return [y, own.max_pool_backward(grad, offsets, x.shape[-2:], *pool[:-1])]


def inputs(pool: Pool, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, tuple(shape), generator=generator).to(dtype)
    y, _ = aten.max_pool2d_with_indices(x, *pool)
    return x, torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
