"""autopar::sdpa_dropout against softmax, autopar::dropout and matmuls, whole and on shards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import autopar.ops  # noqa: F401

own = torch.ops.autopar
SEED = torch.tensor([-7, 2], dtype=torch.int32)
SIZES, WHOLE = [2, 4, 5], [0, 0, 0]
P, SCALE, OP_ID = 0.4, 0.3, 3
ATOL = 1e-13


def operands(value: int = 8, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, groups, 7, 8), (2, groups, 7, value))
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def explicit(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """By autograd, with the mask of `autopar::dropout` of the probabilities."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(1), -math.inf)
    shape = list(scores.shape)
    dropped = own.dropout(scores.softmax(-1), SEED, OP_ID, P, shape, shape, [0] * 4, 3)
    return dropped @ v


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, offsets: Any = WHOLE) -> Any:
    return own.sdpa_dropout(q, k, v, causal, SCALE, SEED, OP_ID, P, SIZES, offsets)


def backward(causal: bool, *saved: Tensor, offsets: Any = WHOLE) -> Any:
    return own.sdpa_dropout_backward(*saved, causal, SCALE, SEED, OP_ID, P, SIZES, offsets)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [8, 6])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_autograd_with_the_mask(causal: bool, value: int, groups: int) -> None:
    inputs = [t.requires_grad_() for t in operands(value, groups)]
    out, lse = attend(*inputs, causal)
    want = explicit(*inputs, causal)
    assert out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(out, want, rtol=0, atol=ATOL)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(out, inputs, dout)
    for got, reference in zip(grads, torch.autograd.grad(want, inputs, dout), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, reference, rtol=0, atol=ATOL)


def test_gradient_is_that_of_finite_differences() -> None:
    inputs = [t.requires_grad_() for t in operands()]
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, True)[0], inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_shards_are_slices_of_the_whole(causal: bool) -> None:
    """Of the second row, the last two heads and the last two queries."""
    q, k, v = operands()
    out, lse = attend(q, k, v, causal)
    mine = (slice(1, 2), slice(2, 4), slice(3, 5))
    local = (q[mine], k[1:, 1:], v[1:, 1:])
    for got, want in zip(attend(*local, causal, [1, 2, 3]), (out, lse), strict=True):
        torch.testing.assert_close(got, want[mine], rtol=0, atol=ATOL)
    dout = torch.randn_like(out)
    dq, dk, dv = backward(causal, dout, q, k, v, out, lse)
    parts = []
    for start, stop in ((0, 3), (3, 5)):
        cut = [t[1:, 2:, start:stop] for t in (dout, q, out, lse)]
        saved = (cut[0], cut[1], k[1:, 1:], v[1:, 1:], cut[2], cut[3])
        parts.append(backward(causal, *saved, offsets=[1, 2, start]))
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 2), dq[1:, 2:], rtol=0, atol=ATOL)
    torch.testing.assert_close(parts[0][1] + parts[1][1], dk[1:, 1:], rtol=0, atol=ATOL)
    torch.testing.assert_close(parts[0][2] + parts[1][2], dv[1:, 1:], rtol=0, atol=ATOL)


def test_other_seeds_microbatches_and_operators_draw_other_masks() -> None:
    q, k, v = operands()

    def out(word: int, microbatch: int, op_id: int) -> Tensor:
        seed = torch.tensor([word, microbatch], dtype=torch.int32)
        made: Tensor = own.sdpa_dropout(q, k, v, False, SCALE, seed, op_id, P, SIZES, WHOLE)[0]
        return made

    first = out(1, 0, 0)
    assert torch.equal(first, out(1, 0, 0))
    for other in (out(2, 0, 0), out(1, 1, 0), out(1, 0, 1)):
        same = torch.isclose(first, other).all(-1)  # rows of seven keys agree by chance
        assert same.double().mean() < 0.2


def test_probabilities_of_zero_and_one() -> None:
    q, k, v = operands()
    out, lse = own.sdpa_dropout(q, k, v, True, SCALE, SEED, OP_ID, 0.0, SIZES, WHOLE)
    for got, want in zip((out, lse), own.sdpa(q, k, v, None, True, SCALE), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    out, lse = own.sdpa_dropout(q, k, v, True, SCALE, SEED, OP_ID, 1.0, SIZES, WHOLE)
    saved = (torch.ones_like(out), q, k, v, out, lse)
    grads = own.sdpa_dropout_backward(*saved, True, SCALE, SEED, OP_ID, 1.0, SIZES, WHOLE)
    assert not out.any() and not any(grad.any() for grad in grads)


def test_without_a_seed_there_is_no_mask() -> None:
    with pytest.raises(ValueError, match="no seed"):
        own.sdpa_dropout(*operands(), True, SCALE, None, OP_ID, P, SIZES, WHOLE)


def test_registration() -> None:
    inputs = [t.requires_grad_() for t in operands()]
    args = (*inputs, True, SCALE, SEED, OP_ID, P, SIZES, WHOLE)
    torch.library.opcheck(own.sdpa_dropout.default, args)


def test_the_operator_for_compiled_code_lies_as_projections_want() -> None:
    q, k, v = operands()
    rest = (True, SCALE, SEED, OP_ID, P, SIZES, WHOLE)
    out, lse = attend(q, k, v, True)
    got, got_lse = own.flash_dropout(q, k, v, *rest)
    assert got.is_contiguous() and torch.equal(got.transpose(1, 2), out)
    assert torch.equal(got_lse, lse)
    saved = (torch.randn_like(out), q, k, v, out, lse)
    grads = own.flash_dropout_backward(*saved, *rest)
    for grad, want in zip(grads, backward(True, *saved), strict=True):
        assert grad.is_contiguous() and torch.equal(grad.transpose(1, 2), want)
    torch.library.opcheck(own.flash_dropout.default, (q, k, v, *rest))
    torch.library.opcheck(own.flash_dropout_backward.default, (*saved, *rest))


def test_flops_are_those_of_attention() -> None:
    with FlopCounterMode(display=False) as counter:
        attend(*(t.requires_grad_() for t in operands()), True)[0].sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4) * 5 * 7 * (8 + 8) * 7 // 2
