"""Mean and variance of a batch's channels in one pass over the batch.

    s        one element of each channel
    mean     s + sum(x - s) / n
    var      (sum((x - s)^2) - sum(x - s)^2 / n) / (n - correction)

Both sums are of one kernel at the speed of memory. Mean and then centred squares read the batch
twice, and Welford's updates cost more instructions than the batch takes to be read. The difference
of squares loses what (mean - s)^2 is over the variance: `s` is of the channel itself, so that this
is of the order of one whatever the mean (n at most, where `s` alone makes the variance), and a
channel of equal elements has variance zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_WIDE = (torch.float32, torch.float64)


def var_mean(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Any:
    """Over all dims but the second; any other call is left to Inductor."""
    dims = [d for d in range(x.ndim) if d != 1]
    n = math.prod(x.shape[d] for d in dims)
    less = 1 if correction is None else correction
    of_channels = dim is not None and x.ndim >= 2 and sorted(d % x.ndim for d in dim) == dims
    if not of_channels or x.dtype not in _WIDE or n <= max(less, 0):
        return NotImplemented
    shift = x
    for d in dims:
        shift = aten.slice.Tensor(shift, d, x.shape[d] // 2, x.shape[d] // 2 + 1)
    moved = x - shift
    total = aten.sum.dim_IntList(moved, dims, True)
    squares = aten.sum.dim_IntList(moved * moved, dims, True)
    apart = total / n
    var = aten.clamp_min.default(squares - total * apart, 0) / (n - less)
    shape = shift.shape if keepdim else (x.shape[1],)
    return _buffer(var.reshape(shape)), _buffer((shift + apart).reshape(shape))


def _buffer(x: Tensor) -> Tensor:
    """Readers load it, and do not make it anew of both sums (`compile.tables`)."""
    made: Tensor = aten.as_strided.default(x, list(x.shape), list(x.stride()), 0)
    return made
