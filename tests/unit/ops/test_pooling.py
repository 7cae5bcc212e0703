"""autopar::max_pool and its gradient are torch's, operator by operator."""

from __future__ import annotations

import pytest
import torch

from tests.devices import DEVICES
from tests.unit.ops.pools import POOLS, Pool, both_ways, by_offsets, inputs

own = torch.ops.autopar

torch.set_num_threads(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("pool", "size"), POOLS)
def test_values_are_torchs(
    pool: Pool, size: tuple[int, int], layout: torch.memory_format, device: str
) -> None:
    x, grad = (t.to(device) for t in inputs(pool, (2, 3, *size), torch.float64))
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    (y, dx), want = by_offsets(x, grad, *pool), both_ways(x, grad, *pool)
    assert torch.equal(y, want[0])
    # GPUs add up windows that share a maximum, up to 25, in any order.
    torch.testing.assert_close(dx, want[1], rtol=0, atol=0 if device == "cpu" else 25e-15)
    assert [y.stride(), dx.stride()] == [each.stride() for each in want]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_narrow_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    pool, size = POOLS[0]
    x, grad = inputs(pool, (2, 3, *size), dtype)
    y, dx = by_offsets(x, grad, *pool)
    want, exact = both_ways(x.double(), grad.double(), *pool)
    assert (y.dtype, dx.dtype) == (dtype, dtype) and torch.equal(y.double(), want)
    torch.testing.assert_close(dx.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_offset_is_a_byte_and_lies_where_its_value_does(layout: torch.memory_format) -> None:
    pool, size = POOLS[6]
    x, _ = inputs(pool, (2, 3, *size), torch.float32)
    x = x.contiguous(memory_format=layout)
    y, offsets = own.max_pool(x, *pool)
    assert offsets.dtype == torch.int8 and offsets.stride() == y.stride()
    assert offsets.min() >= 0 and offsets.max() < 5 * 4


def test_values_that_are_no_number() -> None:
    pool, size = POOLS[0]
    x, grad = inputs(pool, (2, 3, *size), torch.float32)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.05] = torch.nan
    got, want = by_offsets(x, grad, *pool), both_ways(x, grad, *pool)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 3, 11, 13), (3, 11, 13)])
def test_fakes(shape: tuple[int, ...]) -> None:
    pool = POOLS[1][0]
    x, grad = inputs(pool, shape, torch.float32)
    torch.library.opcheck(own.max_pool.default, (x, *pool))
    offsets = own.max_pool(x, *pool)[1]
    torch.library.opcheck(own.max_pool_backward.default, (grad, offsets, [11, 13], *pool[:-1]))
