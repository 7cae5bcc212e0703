"""`autopar::max_pool_backward`: the gradient of a max-pool over rows and columns, from where in its
window each maximum was.

    offsets[o]  r K + c: row and column of the maximum in the window `o` of a kernel with K columns
    dx[i]       sum of grad[o] over windows `o` whose maximum is the element `i`

An offset is a byte; an index of the maximum among the elements of the image is eight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.ops.attention import accumulation_dtype
from autopar.ops.library import LIBRARY, define

_GEOMETRY = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation"
# grad, offsets [.., pooled rows, pooled columns], size: of an image -> [.., *size] that lies in
# memory as the offsets do
define(f"max_pool_backward(Tensor grad, Tensor offsets, int[2] size, {_GEOMETRY}) -> Tensor")


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Plain ATen body of `autopar::max_pool_backward`."""
    rows, columns = (torch.arange(n, device=grad.device) for n in grad.shape[-2:])
    down, right = offsets.long() // kernel[1], offsets.long() % kernel[1]
    row = rows.unsqueeze(1) * stride[0] - padding[0] + down * dilation[0]
    column = columns * stride[1] - padding[1] + right * dilation[1]
    index = (row * size[1] + column).flatten(-2)
    wide = grad.to(accumulation_dtype(grad.dtype)).flatten(-2)
    dx = wide.new_zeros(*wide.shape[:-1], size[0] * size[1]).scatter_add(-1, index, wide)
    return _like(dx.unflatten(-1, list(size)).to(grad.dtype), offsets)


def _fake(grad: Tensor, offsets: Tensor, size: Sequence[int], *_: Sequence[int]) -> Tensor:
    return _like(grad.new_empty((*grad.shape[:-2], *size)), offsets)


def _like(x: Tensor, offsets: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(offsets))


LIBRARY.impl("max_pool_backward", max_pool_backward, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::max_pool_backward", _fake, lib=LIBRARY)
