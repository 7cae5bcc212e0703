"""Sums in a wider type than their operands'."""

from __future__ import annotations

import pytest
import torch

from autopar.ops.wide_sum import add_wide
from tests.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (0, 3), (4097,), (130, 70)])
def test_nothing_is_rounded_before_the_sum(shape: tuple[int, ...], device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator).bfloat16().to(device) for _ in range(2))
    total = torch.empty(shape, device=device)
    assert add_wide(x, y, total) is total
    assert torch.equal(total, x.float() + y.float())
    assert torch.equal(add_wide(y, x, torch.empty_like(total)), total)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_may_differ(device: str) -> None:
    x, y = (torch.full((8, 6), value, dtype=torch.bfloat16, device=device) for value in (1.0, 2.5))
    total = torch.empty(6, 8, device=device).T
    assert torch.equal(add_wide(x, y, total), x.float() + y.float())
