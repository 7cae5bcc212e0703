"""x + y of two tensors in a narrow type, in float32: a gradient whose last addition was left to
whoever reads it first (`compile.peers`)."""

from __future__ import annotations

from torch import Tensor

from autopar.ops.library import has_triton


def add_wide(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """Into `total`, of the same shape and in a wider type. The same bits whichever comes first."""
    alike = x.dtype is y.dtype and all(t.is_contiguous() for t in (x, y, total))
    if not (total.is_cuda and has_triton() and alike):
        return total.copy_(x).add_(y)
    from autopar.ops import wide_sum_kernel

    wide_sum_kernel.add(x, y, total)
    return total
