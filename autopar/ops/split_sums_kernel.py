"""Sums over the rows of several small matrices in Triton, for `ops.split_sums`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

# Of 32 choices on an H100 for 128 to 1024 rows of 768 to 4096 columns: at most 0.3 us behind the
# best one of each.
COLUMNS = 16  # of a program
ROWS = 64  # that it reads at once
WARPS = 8


def add_rows(values: Tensor, sums: Sequence[Tensor]) -> None:
    """N sums [C] of values [N, R, C], contiguous and float32. In float32."""
    number, rows, columns = values.shape
    if not columns:
        return
    with torch.cuda.device(values.device):
        _add_rows_kernel[(triton.cdiv(columns, COLUMNS), number)](
            values, tuple(sums), rows, columns, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=WARPS
        )


@triton.jit  # type: ignore[untyped-decorator]
def _add_rows_kernel(  # type: ignore[no-untyped-def]
    values_ptr,
    sums_ptrs,
    rows,
    columns,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.program_id(1)
    values_ptr += number.to(tl.int64) * rows * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        places = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(values_ptr + places, mask=inside, other=0.0)
    made = tl.sum(total, 0)
    for index in tl.static_range(len(sums_ptrs)):
        if number == index:
            tl.store(sums_ptrs[index] + column, made, mask=column < columns)
