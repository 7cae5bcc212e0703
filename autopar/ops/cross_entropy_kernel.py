"""The passes of cross-entropy over its scores in Triton, for `ops.cross_entropy`.

    softmax_sums    reads x
    gradient        reads x, writes dx, which may be x
    rows            both: a row of scores stays in the cache between the passes, so that device
                    memory is read once. As many rows are on their way as most of the second-level
                    cache holds; the second pass begins where the first ended

A thread keeps maximum and sum of what it sees, and rescales its sum once per `_EACH` elements
(Milakov and Gimelshein, 2018); threads meet at the end of a row.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

_EACH = 8  # elements that a thread loads at once
_CACHE_SHARE = 0.75  # of the second-level cache, for rows on their way
_MOST_PER_PROCESSOR = 4
# Elements at a time and warps of a program, measured on an H100 at 128256 and 51200 classes: of one
# pass (near the memory's rate however it is cut), of both where programs share a processor, of both
# where each has one to itself.
_ONE_PASS, _SHARED, _ALONE = (8192, 16), (8192, 32), (16384, 32)


def softmax_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, V] with rows of stride 1 -> maximum and sum of exp relative to it, float32 [N, 1]."""
    top, total = (x.new_empty((len(x), 1), dtype=torch.float32) for _ in range(2))
    if x.numel():
        _sums_kernel[(len(x),)](x, top, total, x.shape[1], x.stride(0), **_sizes(x, _ONE_PASS))
    return top, total


def gradient(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    first: int,
    dx: Tensor,
) -> None:
    """dx [N, V] of x [N, V], rows of both with stride 1; others as `cross_entropy_backward`."""
    if x.numel():
        _gradient_kernel[(len(x),)](
            grad,
            x,
            target.contiguous(),
            lse.contiguous(),
            dx,
            x.shape[1],
            x.stride(0),
            dx.stride(0),
            ignore_index,
            first,
            **_sizes(x, _ONE_PASS),
        )


def rows(grad: Tensor, x: Tensor, target: Tensor, ignore_index: int, dx: Tensor) -> Tensor:
    """Losses [N]; dx as above."""
    losses = x.new_empty(len(x), dtype=torch.float32)
    if x.numel():
        device = torch.cuda.get_device_properties(x.device)
        processors = device.multi_processor_count
        held = int(_CACHE_SHARE * device.L2_cache_size) // (x.shape[1] * x.itemsize * processors)
        each = min(max(held, 1), _MOST_PER_PROCESSOR)
        _rows_kernel[(min(len(x), processors * each),)](
            grad,
            x,
            target.contiguous(),
            losses,
            dx,
            *x.shape,
            x.stride(0),
            dx.stride(0),
            ignore_index,
            **_sizes(x, _ALONE if each == 1 else _SHARED),
        )
    return losses


def _sizes(x: Tensor, most: tuple[int, int]) -> dict[str, int]:
    block, warps = most
    fits = max(triton.next_power_of_2(x.shape[1]), 32 * _EACH)
    if fits >= block:
        return {"BLOCK": block, "EACH": _EACH, "num_warps": warps}
    return {"BLOCK": fits, "EACH": _EACH, "num_warps": min(warps, fits // (32 * _EACH))}


# No types: Triton would look for the names in annotations.


@triton.jit
def _joined(tops, totals, x):  # type: ignore[no-untyped-def]
    """Maxima and sums with those of more elements, which a thread has for itself."""
    x = x.to(tl.float32)
    higher = tl.maximum(tops, tl.max(x, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # no class was possible so far
    added = tl.sum(tl.exp(x - shift[:, None]), 1)
    return higher, totals * tl.exp(tops - shift) + added


@triton.jit  # type: ignore[untyped-decorator]
def _sums(x_row, classes, BLOCK: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    tops = tl.full((BLOCK // EACH,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK // EACH,), tl.float32)
    whole = classes // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tops, totals = _joined(tops, totals, tl.load(x_row + start + lanes))
    if whole < classes:
        columns = whole + lanes
        x = tl.load(x_row + columns, mask=columns < classes, other=float("-inf"))
        tops, totals = _joined(tops, totals, x)
    top = tl.max(tops, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(totals * tl.exp(tops - shift), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _write(x_row, dx_row, classes, lse, grad, target, picked, counted, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradients of a row. picked: the target's score, read before. Elements are written by the
    thread that read them: from the end, where the pass before this one ended. A mask that ends at
    an odd element makes loads and stores of single ones, so whole blocks have none."""
    columns = tl.arange(0, BLOCK)
    whole = classes // BLOCK * BLOCK
    last = whole + columns
    dtype = dx_row.dtype.element_ty
    if counted:
        if whole < classes:
            x = tl.load(x_row + last, mask=last < classes, other=0.0)
            dx = tl.exp(x.to(tl.float32) - lse) * grad
            tl.store(dx_row + last, dx.to(dtype), mask=last < classes)
        for done in range(BLOCK, whole + BLOCK, BLOCK):
            start = whole - done
            x = tl.load(x_row + start + columns)
            dx = tl.exp(x.to(tl.float32) - lse) * grad
            tl.store(dx_row + start + columns, dx.to(dtype))
        tl.debug_barrier()
        if (target >= 0) & (target < classes):
            tl.store(dx_row + target, ((tl.exp(picked - lse) - 1.0) * grad).to(dtype))
    else:
        nothing = tl.zeros((BLOCK,), dtype)
        for start in range(0, whole, BLOCK):
            tl.store(dx_row + start + columns, nothing)
        if whole < classes:
            tl.store(dx_row + last, nothing, mask=last < classes)


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr, top_ptr, total_ptr, classes, x_stride, BLOCK: tl.constexpr, EACH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    top, total = _sums(x_ptr + row * x_stride, classes, BLOCK, EACH)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    target_ptr,
    lse_ptr,
    dx_ptr,
    classes,
    x_stride,
    dx_stride,
    ignore_index,
    first,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad = tl.load(grad_ptr).to(tl.float32)
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    target -= first
    x_row = x_ptr + row * x_stride
    here = (target >= 0) & (target < classes)
    picked = tl.load(x_row + tl.where(here, target, 0)).to(tl.float32)
    lse = tl.load(lse_ptr + row)
    tl.debug_barrier()  # all have read what one of them may write over
    dx_row = dx_ptr + row * dx_stride
    _write(x_row, dx_row, classes, lse, grad, target, picked, counted, BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    target_ptr,
    losses_ptr,
    dx_ptr,
    rows,
    classes,
    x_stride,
    dx_stride,
    ignore_index,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    grad = tl.load(grad_ptr).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target = tl.load(target_ptr + row)
        counted = target != ignore_index
        x_row = x_ptr + tl.cast(row, tl.int64) * x_stride
        dx_row = dx_ptr + tl.cast(row, tl.int64) * dx_stride
        picked = tl.load(x_row + tl.where(counted, target, 0)).to(tl.float32)
        top, total = _sums(x_row, classes, BLOCK, EACH)
        lse = tl.log(total) + top
        tl.store(losses_ptr + row, tl.where(counted, lse - picked, 0.0))
        tl.debug_barrier()  # all have read what one of them may write over
        _write(x_row, dx_row, classes, lse, grad, target, picked, counted, BLOCK)
