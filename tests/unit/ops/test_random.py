"""autopar::dropout: statistics of the mask, and the same mask under any cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import autopar.ops  # noqa: F401
from autopar.ops.random import make_keys, mix, mix_int

ROWS, COLS = 512, 1024


def seed_of(value: int, microbatch: int = 0) -> Tensor:
    return torch.tensor([value, microbatch], dtype=torch.int32)


def dropped(x: Tensor, seed: int = 1, op_id: int = 0, p: float = 0.5) -> Tensor:
    sizes = tuple(x.shape)
    rows = max(x.ndim - 1, 0)
    return torch.ops.autopar.dropout(x, seed_of(seed), op_id, p, sizes, sizes, [0] * x.ndim, rows)


def mask(seed: int = 1, op_id: int = 0, p: float = 0.5) -> Tensor:
    return dropped(torch.ones(ROWS, COLS), seed, op_id, p) != 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mean_is_kept_and_counts_are_binomial(p: float) -> None:
    kept = mask(p=p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * sigma / (ROWS * COLS) ** 0.5
    for dim, count in ((0, ROWS), (1, COLS)):  # variance of the counts along either dim
        ratio = kept.sum(dim).var().item() / (count * p * (1 - p))
        assert 0.75 < ratio < 1.3
    values = dropped(torch.ones(ROWS, COLS, dtype=torch.float64), p=p)
    assert set(values.unique().tolist()) == {0.0, 1.0 / (1.0 - p)}


def correlation_z(a: Tensor, b: Tensor) -> float:
    """Standard deviations by which two masks of probability 1/2 agree too often."""
    agree = (a == b).double()
    return float((agree.mean() - 0.5) * 2 * agree.numel() ** 0.5)


def test_neighbours_are_independent() -> None:
    m = mask()
    for shift in (1, 2, 3, 16, 64):
        assert abs(correlation_z(m[:, shift:], m[:, :-shift])) < 4.5
        assert abs(correlation_z(m[shift:], m[:-shift])) < 4.5
    assert abs(correlation_z(m[1:, 1:], m[:-1, :-1])) < 4.5


def test_seeds_and_operators_are_independent() -> None:
    masks = [mask(seed, op_id) for seed in (0, 1, 2, -5) for op_id in (0, 1, 2)]
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation_z(a, b)) < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shard_is_slice_of_whole_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 8, 10, dtype=dtype, generator=torch.Generator().manual_seed(0))
    whole = dropped(x, seed=7, op_id=3, p=0.3)
    cuts = [(slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 6)), (slice(4, 8),), (slice(5, 10),)]
    for cut in itertools.product(*cuts):
        part = x[cut]
        offsets = [s.start for s in cut]
        got = torch.ops.autopar.dropout(
            part, seed_of(7), 3, 0.3, x.shape, part.shape, offsets, x.ndim - 1
        )
        assert torch.equal(got, whole[cut])


def test_dim_of_several_atoms_cut_in_its_second_atom() -> None:
    x = torch.randn(4 * 6, 8)  # dims ((4, 6), 8), the atom of size 6 cut in halves
    whole = dropped(x, seed=2)
    for start in (0, 3):
        part = x.view(4, 6, 8)[:, start : start + 3].reshape(12, 8)
        want = whole.view(4, 6, 8)[:, start : start + 3].reshape(12, 8)
        args = ((4, 6, 8), (4, 3, 8), (0, start, 0), 2)
        assert torch.equal(torch.ops.autopar.dropout(part, seed_of(2), 0, 0.5, *args), want)


def test_gradient_has_the_same_mask() -> None:
    x = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    y = dropped(x, p=0.25)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad * x, y)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    assert dropped(torch.ones(shape)).shape == shape


def test_certain_probabilities() -> None:
    x = torch.randn(4, 4)
    assert torch.equal(dropped(x, p=0.0), x) and dropped(x, p=0.0).data_ptr() != x.data_ptr()
    assert not dropped(x, p=1.0).any()


def test_rows_beyond_32_bits_of_elements() -> None:
    """Rows and columns are hashed apart: an element's linear index may pass 2^32."""
    x = torch.ones(1, 64)
    args = ((2**31, 64), (1, 64))
    masks = [
        torch.ops.autopar.dropout(x, seed_of(1), 0, 0.5, *args, (row, 0), 1)
        for row in (0, 2**26, 2**31 - 1)
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_integer_and_tensor_hash_agree() -> None:
    words = [0, 1, 2, 12345, 2**31 - 1, 2**32 - 1]
    signed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert [w & 0xFFFFFFFF for w in mix(signed).tolist()] == [mix_int(w) for w in words]


def test_keys_of_several_operators_are_those_of_each() -> None:
    seed, op_ids = seed_of(2**31 - 5, 3), [0, 1, 17, 2**31 + 4]
    each = [torch.cat(make_keys(seed, op_id)) for op_id in op_ids]
    assert torch.equal(torch.ops.autopar.random_keys(seed, op_ids), torch.stack(each))


def test_registration() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    args = (x, seed_of(1), 0, 0.3, [4, 6], [4, 6], [0, 0], 1)
    torch.library.opcheck(torch.ops.autopar.dropout.default, args)
