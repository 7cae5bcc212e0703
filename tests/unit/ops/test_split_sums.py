"""Sums that were split, against sums in float64."""

from __future__ import annotations

import pytest
import torch

import autopar.ops  # noqa: F401  (registers the operator)
from tests.devices import DEVICES

split_sums = torch.ops.autopar.split_sums


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("number", "rows", "columns"),
    [(1, 1, 1), (2, 512, 768), (3, 130, 70), (1, 1024, 4096), (2, 64, 15), (2, 0, 8)],
)
def test_sums(number: int, rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    parts = torch.randn(number * rows * columns + 5, generator=generator).to(device)
    made = split_sums(parts, number, rows, columns, dtype)
    values = parts[:-5].view(number, rows, columns)
    assert len(made) == number
    for total, want in zip(made, values.double().sum(1), strict=True):
        assert total.shape == (columns,) and total.dtype is dtype and total.stride() == (1,)
        assert total.untyped_storage().nbytes() == total.numel() * total.itemsize
        rtol = 4e-3 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(total.double(), want, rtol=rtol, atol=1e-4)
