"""`autopar::max_pool`: a max-pool over rows and columns, and where in its window each maximum is;
`autopar::max_pool_backward`: its gradient, from that alone.

    offsets[o]  r K + c: row and column of the maximum in the window `o` of a kernel with K columns
    dx[i]       sum of grad[o] over windows `o` whose maximum is the element `i`

An offset is a byte; an index of the maximum among the elements of the image is eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ops.attention import accumulation_dtype
from autopar.ops.library import LIBRARY, define

aten = torch.ops.aten

_GEOMETRY = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation"
# x [.., rows, columns] of a floating type -> y, int8 offsets: [.., pooled rows, pooled columns], in
# memory as x is. A window has at most 127 elements.
define(f"max_pool(Tensor x, {_GEOMETRY}, bool ceil_mode) -> (Tensor y, Tensor offsets)")
# grad, offsets [.., pooled rows, pooled columns], size: of an image -> [.., *size] that lies in
# memory as the offsets do
define(f"max_pool_backward(Tensor grad, Tensor offsets, int[2] size, {_GEOMETRY}) -> Tensor")


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Plain ATen body of `autopar::max_pool`. Of equal maxima, ATen's choice."""
    y, index = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    rows, columns = (torch.arange(n, device=x.device) for n in y.shape[-2:])
    top = rows.unsqueeze(1) * stride[0] - padding[0]
    left = columns * stride[1] - padding[1]
    down = (index // x.shape[-1] - top) // dilation[0]
    right = (index % x.shape[-1] - left) // dilation[1]
    return y, (down * kernel[1] + right).to(torch.int8)


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
    # a shard's padding holds zeros, and an image may start after the first offset of its window
    index = (row.clamp(min=0) * size[1] + column.clamp(min=0)).flatten(-2)
    wide = grad.to(accumulation_dtype(grad.dtype)).flatten(-2)
    dx = wide.new_zeros(*wide.shape[:-1], size[0] * size[1]).scatter_add(-1, index, wide)
    return _like(dx.unflatten(-1, list(size)).to(grad.dtype), offsets)


def _fake(x: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    y, index = aten.max_pool2d_with_indices(x, *geometry)
    return y, torch.empty_like(index, dtype=torch.int8)


def _fake_backward(grad: Tensor, offsets: Tensor, size: Sequence[int], *_: Sequence[int]) -> Tensor:
    return _like(grad.new_empty((*grad.shape[:-2], *size)), offsets)


def _like(x: Tensor, offsets: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(offsets))


for _name, _body, _shapes in (
    ("max_pool", max_pool, _fake),
    ("max_pool_backward", max_pool_backward, _fake_backward),
):
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autopar::{_name}", _shapes, lib=LIBRARY)
