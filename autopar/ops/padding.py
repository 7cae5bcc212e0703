"""`autopar::padded_narrow(x, dim, start, length)`: `narrow` that may run past the end.

Rows beyond the end are zeros, so that the shards of a tensor that does not divide evenly have one
shape. The result is a contiguous copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

define("padded_narrow(Tensor x, int dim, SymInt start, SymInt length) -> Tensor")


def padded_narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """start >= 0, also beyond the end: all zeros then."""
    start = min(start, x.shape[dim])
    rows = min(length, x.shape[dim] - start)
    return pad_rows(x.narrow(dim, start, rows), dim, length)


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
