"""A sum in a wider type in Triton, for `ops.wide_sum`: torch would write one operand in that type
first."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

_BLOCK = 4096  # elements of a program
_WARPS = 8


def add(x: Tensor, y: Tensor, total: Tensor) -> None:
    """Contiguous tensors of one shape; x and y of one type."""
    if total.numel():
        with torch.cuda.device(total.device):
            _add_kernel[(triton.cdiv(total.numel(), _BLOCK),)](
                x, y, total, total.numel(), BLOCK=_BLOCK, num_warps=_WARPS
            )


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, total_ptr, numel, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    wide = total_ptr.dtype.element_ty
    x = tl.load(x_ptr + place, mask=inside).to(wide)
    y = tl.load(y_ptr + place, mask=inside).to(wide)
    tl.store(total_ptr + place, x + y, mask=inside)
