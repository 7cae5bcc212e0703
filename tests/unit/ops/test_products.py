"""Products in a wider type than that of their operands."""

from __future__ import annotations

import pytest
import torch

import autopar.ops  # noqa: F401  (registers autopar::wide_product)
from tests.devices import DEVICES

own = torch.ops.autopar


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("is_transposed", [(False, False), (True, False), (False, True)])
def test_sums_are_not_rounded(
    device: str, dtype: torch.dtype, batch: tuple[int, ...], is_transposed: tuple[bool, bool]
) -> None:
    generator = torch.Generator().manual_seed(0)
    operands = []
    for shape, transposed in zip([(48, 64), (64, 80)], is_transposed, strict=True):
        lies = shape[::-1] if transposed else shape
        x = torch.randn(*batch, *lies, generator=generator).to(device, dtype)
        operands.append(x.mT if transposed else x)
    product = own.wide_product(*operands, torch.float32)
    a, b = (x.double() for x in operands)
    assert product.dtype is torch.float32 and product.is_contiguous()
    torch.testing.assert_close(product.double(), a @ b, rtol=1e-5, atol=1e-5)
