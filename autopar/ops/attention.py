"""`autopar::sdpa` and `autopar::sdpa_backward`: attention as one operator with its own backward.

    s = scale * q k^T + bias (-inf where a query must not see);    lse = log sum exp s
    p = exp(s - lse);  out = p v
    ds = p * (dout v^T - sum(dout * out));  dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T dout

Shapes: q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] with H a multiple of G (grouped queries),
bias [B|1, H|1, S|1, T|1] without gradient; out [B, H, S, E], lse [B, H, S] in fp32 (fp64 for
fp64). A row whose every score is -inf gives out = 0, lse = 0 and no gradient. If causal, query i
sees the keys up to first_query + i: 0, a diagonal from the upper left, is torch's mask; a shard of
the queries gets the number of its first one. Legend: B batch, H heads, G key heads, S queries, T
keys, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from autopar.ops.library import LIBRARY, define

aten = torch.ops.aten

Drop = Callable[[Tensor], Tensor]
"""Dropout of a [B, H, S, T]: linear, the same mask each time."""

define(
    "sdpa(Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, float scale,"
    " SymInt first_query=0) -> (Tensor out, Tensor lse)"
)
define(
    "sdpa_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse,"
    " bool causal, float scale, SymInt first_query=0) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def sdpa_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    first_query: int = 0,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor]:
    """Explicit attention in the accumulation dtype: any device, any widths. O(B H S T) memory.
    drop: of the probabilities, which then do not add up to 1; lse is that of all scores."""
    groups = q.shape[1] // k.shape[1]
    scores = _scores(q, _expand_heads(k, groups), bias, causal, scale, first_query)
    lse = torch.logsumexp(scores, dim=-1)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)  # [B, H, S]
    probs = torch.exp(scores - lse.unsqueeze(-1))
    if drop is not None:
        probs = drop(probs)
    out = probs @ _expand_heads(v, groups).to(probs.dtype)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def sdpa_backward_math(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    first_query: int = 0,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Explicit gradient of :func:`sdpa_math`. sum(dout * out) is sum(p * dp) with dropout too, as
    out is linear in p."""
    groups = q.shape[1] // k.shape[1]
    acc = accumulation_dtype(q.dtype)
    k_wide, v_wide = (_expand_heads(t, groups).to(acc) for t in (k, v))
    scores = _scores(q, k_wide, bias, causal, scale, first_query)
    probs = torch.exp(scores - lse.unsqueeze(-1))
    dout = dout.to(acc)
    delta = (dout * out.to(acc)).sum(-1, keepdim=True)
    dprobs = dout @ v_wide.mT  # [B, H, S, T]
    kept = probs if drop is None else drop(probs)
    dprobs = dprobs if drop is None else drop(dprobs)
    dscores = probs * (dprobs - delta) * scale
    dq = dscores @ k_wide
    dk = _sum_heads(dscores.mT @ q.to(acc), groups)
    dv = _sum_heads(kept.mT @ dout, groups)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _sdpa_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    first_query: int = 0,
) -> tuple[Tensor, Tensor]:
    if not _has_cpu_flash(q, v, causal, first_query):
        return sdpa_math(q, k, v, bias, causal, scale, first_query)
    q, k, v = map(with_dense_rows, (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = _expand_heads(k, groups), _expand_heads(v, groups)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out.contiguous(), lse.contiguous()


def _sdpa_backward_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    first_query: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_cpu_flash(q, v, causal, first_query):
        return sdpa_backward_math(dout, q, k, v, bias, out, lse, causal, scale, first_query)
    q, k, v, out = map(with_dense_rows, (q, k, v, out))
    groups = q.shape[1] // k.shape[1]
    k, v = _expand_heads(k, groups), _expand_heads(v, groups)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    return (
        dq.contiguous(),
        _sum_heads(dk, groups).contiguous(),
        _sum_heads(dv, groups).contiguous(),
    )


class AttentionKernel(NamedTuple):
    """A kernel of torch for CUDA. forward: (q, k, v, causal, scale) -> (out, lse). backward:
    (dout, q, k, v, out, lse, causal, scale) -> (dq, dk, dv). grouped: whether it takes fewer key
    heads than query heads. Results lie in memory as the kernel leaves them."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grouped: bool


def attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, first_query: int = 0
) -> AttentionKernel | None:
    """The fastest kernel of the device that computes the call exactly; None: explicit attention.

    cuDNN's from Hopper on for half precision and widths up to 128, else flash attention, for
    float32 the memory-efficient one. None of them has our bias, or a diagonal that starts elsewhere
    than at the upper left."""
    width = q.shape[3]
    square = not causal or q.shape[2] == k.shape[2]
    plain = bias is None and not first_query and square and width == v.shape[3]
    if q.device.type != "cuda" or not plain or width % 8 or width > 256 or not q.numel():
        return None
    if q.dtype == torch.float32:
        return _EFFICIENT if q.shape[2] % 32 == 0 else None  # else its lse is padded
    if q.dtype not in (torch.float16, torch.bfloat16):
        return None
    hopper = torch.cuda.get_device_capability(q.device)[0] >= 9
    return _CUDNN if hopper and width <= 128 else _FLASH


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.reshape(lse.shape[:3])


def _cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    unread = q.new_zeros((), dtype=torch.int64)  # state of the dropout that there is none of
    sizes = (q.shape[2], k.shape[2], 0.0, causal)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(3), unread, unread, None, None, None, *sizes, scale=scale
    )
    return dq, dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return out, lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = q.new_zeros(2, dtype=torch.uint64)  # of the dropout that there is none of
    unused = q.new_zeros((), dtype=torch.uint64)
    sizes = (q.shape[2], k.shape[2], 0.0, causal)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, *sizes, state, unused, scale=scale
    )
    return dq, dk, dv


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out, lse


def _efficient_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    unread = q.new_zeros((), dtype=torch.int64)
    mask = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, unread, unread, 0.0, mask, causal, scale=scale
    )
    return dq, dk, dv


def sdpa_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    first_query: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """By the device's kernel; None where it has none for the call."""
    kernel = attention_kernel(q, k, v, bias, causal, first_query)
    if kernel is None:
        return None
    groups = 1 if kernel.grouped else q.shape[1] // k.shape[1]
    return kernel.forward(q, _expand_heads(k, groups), _expand_heads(v, groups), causal, scale)


def sdpa_backward_fused(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    first_query: int = 0,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the device's kernel; None where it has none for the call."""
    kernel = attention_kernel(q, k, v, bias, causal, first_query)
    if kernel is None:
        return None
    groups = 1 if kernel.grouped else q.shape[1] // k.shape[1]
    wide = (_expand_heads(k, groups), _expand_heads(v, groups))
    dq, dk, dv = kernel.backward(dout, q, *wide, out, lse, causal, scale)
    return dq, _sum_heads(dk, groups), _sum_heads(dv, groups)


def _sdpa_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    found = sdpa_fused(*args)
    if found is None:
        return sdpa_math(*args)
    out, lse = found
    return out.contiguous(), lse.contiguous()


def _sdpa_backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = sdpa_backward_fused(*args)
    if found is None:
        return sdpa_backward_math(*args)
    dq, dk, dv = found
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


_CUDNN = AttentionKernel(_cudnn, _cudnn_backward, True)
_FLASH = AttentionKernel(_flash, _flash_backward, True)
_EFFICIENT = AttentionKernel(_efficient, _efficient_backward, False)


def sdpa_fake(q: Tensor, k: Tensor, v: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    if q.ndim != 4 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "autopar::sdpa wants q [B, H, S, D], k [B, G, T, D] with H a multiple of G:"
            f" got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, heads, queries, v.shape[3])
    return out, q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))


def _sdpa_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything narrower accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, first_query: int
) -> Tensor:
    acc = accumulation_dtype(q.dtype)
    scores = (q.to(acc) @ k.to(acc).mT) * scale  # [B, H, S, T]
    if bias is not None:
        scores = scores + bias.to(acc)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(first_query)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores


def _expand_heads(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_heads(x: Tensor, groups: int) -> Tensor:
    """Adjoint of :func:`_expand_heads`."""
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def _has_cpu_flash(q: Tensor, v: Tensor, causal: bool, first_query: int) -> bool:
    """torch's CPU kernel has one width for keys and values, no empty tensors, and its causal
    diagonal starts at the upper left."""
    plain = q.shape[3] == v.shape[3] and q.numel() > 0 and v.numel() > 0
    return plain and not (causal and first_query)


def with_dense_rows(x: Tensor) -> Tensor:
    """torch's CPU kernel reads the last dim as if its stride were 1, whatever it is."""
    return x if x.stride(3) == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, bias, *output)


def _sdpa_grad(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    """lse is for backward only: its own gradient is not defined and not looked at."""
    q, k, v, bias, out, lse = ctx.saved_tensors
    grads = torch.ops.autopar.sdpa_backward(dout, q, k, v, bias, out, lse, *ctx.constants)
    return (*grads, None, *(None for _ in ctx.constants))


LIBRARY.impl("sdpa", _sdpa_cpu, "CPU")
LIBRARY.impl("sdpa_backward", _sdpa_backward_cpu, "CPU")
LIBRARY.impl("sdpa", _sdpa_cuda, "CUDA")
LIBRARY.impl("sdpa_backward", _sdpa_backward_cuda, "CUDA")
torch.library.register_fake("autopar::sdpa", sdpa_fake, lib=LIBRARY)
torch.library.register_fake("autopar::sdpa_backward", _sdpa_backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "autopar::sdpa", _sdpa_grad, setup_context=_setup_context, lib=LIBRARY
)


def sdpa_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any
) -> int:
    """Torch's convention for attention: the whole square, causal or not."""
    wide = (q_shape[0], q_shape[1])
    return int(sdpa_flop_count(q_shape, (*wide, *k_shape[2:]), (*wide, *v_shape[2:])))


def sdpa_backward_flops(
    dout_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_args: Any, **_kwargs: Any
) -> int:
    """Torch's convention: five matmuls over the whole square."""
    wide = (q_shape[0], q_shape[1])
    return int(
        sdpa_backward_flop_count(dout_shape, q_shape, (*wide, *k_shape[2:]), (*wide, *v_shape[2:]))
    )


register_flop_formula(torch.ops.autopar.sdpa)(sdpa_flops)
register_flop_formula(torch.ops.autopar.sdpa_backward)(sdpa_backward_flops)
