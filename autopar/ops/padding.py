"""`autopar::padded_narrow(x, dim, start, length)`: `narrow` that may run past the end.

Rows beyond the end are zeros, so that the shards of a tensor that does not divide evenly have one
shape. The result is a contiguous copy.

`autopar::aligned_product(a [m, k], b [k, n])`: a @ b; a compiler leaves room between its rows where
they would not be aligned (`compile.alignment`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

define("padded_narrow(Tensor x, int dim, SymInt start, SymInt length) -> Tensor")
define("aligned_product(Tensor a, Tensor b) -> Tensor")


def padded_narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """start >= 0, also beyond the end: all zeros then. Every start reads x, as in
    `keep_on_first`."""
    size = x.shape[dim]
    if start + length <= size:
        return x.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)
    rows = torch.arange(length, device=x.device) + start
    there = (rows < size).reshape([-1, *(1 for _ in range(x.ndim - 1 - dim))])
    if size == 0:
        return x.new_zeros([*x.shape[:dim], length, *x.shape[dim + 1 :]])
    found = x.index_select(dim, rows.clamp(max=size - 1))
    return torch.where(there, found, torch.zeros((), dtype=x.dtype, device=x.device)).contiguous()


def pad_rows(x: Tensor, dim: int, length: int) -> Tensor:
    """A contiguous copy with zeros up to `length` rows along `dim`."""
    if x.shape[dim] == length:
        return x.clone(memory_format=torch.contiguous_format)
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, length - x.shape[dim]]
    return torch.constant_pad_nd(x, padding).contiguous()


def _fake(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], length, *x.shape[dim + 1 :]))


LIBRARY.impl("padded_narrow", padded_narrow, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::padded_narrow", _fake, lib=LIBRARY)
LIBRARY.impl("aligned_product", torch.mm, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::aligned_product", torch.mm, lib=LIBRARY)
