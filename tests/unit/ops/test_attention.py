"""autopar::sdpa against torch's own attention, on whole tensors and on shards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import autopar.ops  # noqa: F401
from autopar.ops.attention import sdpa_backward_math, sdpa_math

SDPA = torch.ops.autopar.sdpa
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def qkv(dtype: torch.dtype, heads: int = 4, groups: int = 2, value: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 5, 8), (2, groups, 7, 8), (2, groups, 7, value))
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def bias_of(kind: str, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    bias = torch.randn(2, 1, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    if kind == "masked":
        bias[:, :, 1, 2] = -math.inf
        bias[:, :, 0] = -math.inf  # a row that sees nothing
    return bias


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias_kind", ["none", "float", "masked"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [8, 6])
def test_equals_torch(dtype: torch.dtype, bias_kind: str, causal: bool, value: int) -> None:
    q, k, v = qkv(dtype, value=value)
    bias = bias_of(bias_kind, dtype)
    out, lse = SDPA(q, k, v, bias, causal, 0.3)
    mask = torch.zeros(5, 7, dtype=dtype) if bias is None else bias
    if causal:
        mask = mask.masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(1), -math.inf)
    want = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=0, atol=TOLERANCE[dtype])
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == dtype
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    wants = torch.autograd.grad(want, (q, k, v), dout)
    for got, reference in zip(grads, wants, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, reference, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("bias_kind", ["none", "masked"])
def test_math_and_kernel_agree(bias_kind: str) -> None:
    q, k, v = (t.detach() for t in qkv(torch.float64))
    bias = bias_of(bias_kind, torch.float64)
    out, lse = SDPA(q, k, v, bias, True, 0.3)
    for got, want in zip(sdpa_math(q, k, v, bias, True, 0.3), (out, lse), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    args = (torch.randn_like(out), q, k, v, bias, out, lse, True, 0.3)
    kernel = torch.ops.autopar.sdpa_backward(*args)
    for got, want in zip(sdpa_backward_math(*args), kernel, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_shards_of_batch_and_heads_are_slices_of_the_whole() -> None:
    q, k, v = (t.detach() for t in qkv(torch.float64))
    bias = bias_of("float", torch.float64)
    assert bias is not None
    whole, _ = SDPA(q, k, v, bias, False, 0.3)
    shard, _ = SDPA(q[1:, 2:], k[1:, 1:], v[1:, 1:], bias[1:], False, 0.3)
    torch.testing.assert_close(shard, whole[1:, 2:], rtol=0, atol=1e-15)


@pytest.mark.parametrize("bias_kind", ["none", "masked"])
def test_a_shard_of_the_queries_is_a_slice_of_the_whole(bias_kind: str) -> None:
    q, k, v = (t.detach() for t in qkv(torch.float64))
    bias = bias_of(bias_kind, torch.float64)
    part = None if bias is None else bias[:, :, 3:]
    out, lse = SDPA(q, k, v, bias, True, 0.3)
    shard = SDPA(q[:, :, 3:], k, v, part, True, 0.3, first_query=3)
    for got, want in zip(shard, (out, lse), strict=True):
        torch.testing.assert_close(got, want[:, :, 3:], rtol=0, atol=1e-14)
    dout = torch.randn_like(out)
    backward = torch.ops.autopar.sdpa_backward
    dq, dk, dv = backward(dout, q, k, v, bias, out, lse, True, 0.3)
    parts = [
        backward(*(t[:, :, s] for t in (dout, q)), k, v, b, *saved, True, 0.3, first_query=start)
        for s, b, saved, start in (
            (
                slice(0, 3),
                None if bias is None else bias[:, :, :3],
                (out[:, :, :3], lse[:, :, :3]),
                0,
            ),
            (slice(3, 5), part, (out[:, :, 3:], lse[:, :, 3:]), 3),
        )
    ]
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 2), dq, rtol=0, atol=1e-14)
    torch.testing.assert_close(parts[0][1] + parts[1][1], dk, rtol=0, atol=1e-13)
    torch.testing.assert_close(parts[0][2] + parts[1][2], dv, rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_registration(causal: bool) -> None:
    torch.library.opcheck(SDPA.default, (*qkv(torch.float32), None, causal, 0.3))


def test_bfloat16_keeps_a_float32_lse() -> None:
    q, k, v = qkv(torch.bfloat16)
    out, lse = SDPA(q, k, v, None, True, 0.3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_flops_count_query_heads() -> None:
    q, k, v = qkv(torch.float32)
    with FlopCounterMode(display=False) as counter:
        SDPA(q, k, v, None, False, 0.3)[0].sum().backward()
    forward = 2 * (2 * 4) * 5 * 7 * (8 + 8)  # multiply-adds of q k^T and p v
    assert counter.get_total_flops() == forward + forward * 5 // 2


def test_bad_heads_are_refused() -> None:
    q, k, v = (t.to("meta") for t in qkv(torch.float32, heads=3))
    with pytest.raises(ValueError, match="multiple"):
        SDPA(q, k, v, None, False, 0.3)


@pytest.mark.parametrize("transposed", range(4))
def test_any_strides(transposed: int) -> None:
    """A gather along the head dim may leave it with another stride than 1."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, 4, 6, 4, dtype=torch.float64, generator=generator) for _ in range(4)
    )
    out, lse = SDPA(q, k, v, None, False, 0.3)
    want = (out, *torch.ops.autopar.sdpa_backward(dout, q, k, v, None, out, lse, False, 0.3))
    tensors = [q, k, v, out]
    tensors[transposed] = tensors[transposed].mT.contiguous().mT
    q, k, v, out = tensors
    grads = torch.ops.autopar.sdpa_backward(dout, q, k, v, None, out, lse, False, 0.3)
    for got, value in zip((SDPA(q, k, v, None, False, 0.3)[0], *grads), want, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-14)
