"""Max-pools by offsets: Inductor's, and a gradient with as few look-ups of windows as there are.

    h + padding = stride o + dilation r        row `r` of window `o` is row `h` of the image

Of a 3 x 3 kernel with stride 2, an element whose row and column are even lies in one window, others
in two or four. Inductor looks four windows up for each, and divides each offset in a window to get
an index among the elements of the image: 2.2 ms on H100, where memory takes 0.3. Here elements
whose rows and columns leave the same remainders by the strides are one loop, which compares bytes
with the offsets that its windows have there; Inductor runs the loops, over the same windows, as one
kernel. Those of a step of Wide-ResNet took 2.0 ms less.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopar.ops.attention import accumulation_dtype


def max_pool(x: Tensor, *geometry: Any) -> Any:
    """Inductor's own. Pre: windows and steps of at most `graph.pools.MOST` elements."""
    return torch.ops.prims._low_memory_max_pool_with_offsets(x, *geometry)


def max_pool_backward(
    grad: Any,
    offsets: Any,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """Lowering of `autopar::max_pool_backward`: a loop for each pair of remainders, which writes
    its elements of the result."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    *batch, pooled_rows, pooled_columns = [int(n) for n in grad.get_size()]
    pooled = (pooled_rows, pooled_columns)
    strides = V.graph.current_node.meta["val"].stride()
    layout = ir.FixedLayout(grad.get_device(), grad.get_dtype(), [*batch, *size], list(strides))
    whole = ir.ConcatKernel(name=None, layout=layout, inputs=[])
    box, parts = ir.StorageBox(whole), []
    for start in itertools.product(*map(range, map(min, stride, size))):
        part: Any = box
        for d, first in enumerate(start):
            part = ir.SliceView.create(part, len(batch) + d, first, size[d], stride[d])
        counts = [int(n) for n in part.get_size()]
        windows = list(map(_windows, start, counts[-2:], pooled, kernel, stride, padding, dilation))
        loop = ir.Pointwise.create(
            device=grad.get_device(),
            dtype=grad.get_dtype(),
            inner_fn=_sum_of_windows(grad, offsets, kernel[1], windows),
            ranges=counts,
        )
        parts.append(ir.ConcatKernel.realize_into(loop, part))
    whole.name = V.graph.register_buffer(whole)
    whole.inputs = ir.ConcatKernel.unwrap_storage(parts)
    V.graph.register_operation(whole)
    return ir.TensorBox(box)


@dataclass(frozen=True, slots=True)
class _Window:
    """That in which element `first + stride i` has offset `offset`: number `i + ahead`, if it is
    one of `pooled`, as for every i if `always`."""

    ahead: int
    offset: int
    pooled: int
    always: bool


def _windows(
    first: int, count: int, pooled: int, kernel: int, stride: int, padding: int, dilation: int
) -> list[_Window]:
    """Of elements i < count along one dim, by number."""
    found = []
    for offset in reversed(range(kernel)):
        ahead, rest = divmod(first + padding - dilation * offset, stride)
        if rest == 0 and -count < ahead < pooled:
            always = ahead >= 0 and count + ahead <= pooled
            found.append(_Window(ahead, offset, pooled, always))
    return found


def _sum_of_windows(
    grad: Any, offsets: Any, kernel_columns: int, windows: Sequence[Sequence[_Window]]
) -> Callable[[Sequence[Any]], Any]:
    from torch._inductor.virtualized import ops

    grad_of, offset_of = grad.make_loader(), offsets.make_loader()
    dtype = grad.get_dtype()
    wide = accumulation_dtype(dtype)

    def share(index: Sequence[Any], down: _Window, right: _Window) -> Any:
        where = [*index[:-2], index[-2] + down.ahead, index[-1] + right.ahead]
        maximum = ops.constant(down.offset * kernel_columns + right.offset, torch.int8)
        value = ops.to_dtype(grad_of(where), wide)
        return ops.where(ops.eq(offset_of(where), maximum), value, ops.constant(0.0, wide))

    def element(index: Sequence[Any]) -> Any:
        total = ops.constant(0.0, wide)
        for pair in itertools.product(*windows):
            found = partial(share, index, *pair)
            there = _there(index[-2:], pair)
            total = ops.add(total, ops.masked(there, found, 0.0) if there else found())
        return ops.to_dtype(total, dtype)

    return element


def _there(index: Sequence[Any], pair: Sequence[_Window]) -> Any:
    """Whether there are such windows; None if always."""
    from torch._inductor.virtualized import ops

    tests = []
    for i, window in zip(index, pair, strict=True):
        if not window.always:
            at = ops.index_expr(i + window.ahead, torch.int32)
            low, high = (ops.constant(bound, torch.int32) for bound in (0, window.pooled))
            tests += [ops.ge(at, low), ops.lt(at, high)]
    return functools.reduce(ops.and_, tests) if tests else None
