"""`autopar::sdpa_dropout` and its backward: attention whose probabilities are dropped out inside.

    s = scale * q k^T (-inf where a query must not see);    lse = log sum exp s,  p = exp(s - lse)
    d = keep / (1 - rate);  out = (p d) v
    ds = p * (d (dout v^T) - sum(dout * out));  dq = scale * ds k,  dk = scale * ds^T q
    dv = (p d)^T dout

d is the mask of `autopar::dropout` of the whole probabilities [B, H, S, T], one row per batch, head
and query: a hash of the global index (`ops.random`), so that backward makes it again. Shapes and
lse as of `ops.attention`, without a bias. Shards are of the batch, the heads and the queries:

    sizes     global [B, H, S]
    offsets   where the shard starts in each; a causal diagonal starts at the same query
    seed      int32[2]; None only while a model is captured (`graph.randomness` puts it there)

`autopar::flash_dropout` and its backward are the same by one kernel (`ops.attention_kernel`), which
keeps no scores: operators for compiled code. Their results, but for lse, lie as projections want
them, out and dq [B, S, H, D], dk and dv [B, T, G, D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autopar.ops.attention import (
    Drop,
    accumulation_dtype,
    sdpa_backward_flops,
    sdpa_backward_math,
    sdpa_fake,
    sdpa_flops,
    sdpa_math,
    with_dense_rows,
)
from autopar.ops.library import LIBRARY, define, has_triton
from autopar.ops.random import counter_dropout

own = torch.ops.autopar

_MASK = "Tensor? seed, int op_id, float p, int[] sizes, int[] offsets"
define(
    f"sdpa_dropout(Tensor q, Tensor k, Tensor v, bool causal, float scale, {_MASK})"
    " -> (Tensor out, Tensor lse)"
)
define(
    "sdpa_dropout_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" bool causal, float scale, {_MASK}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
define(
    "flash_dropout(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor seed, int op_id,"
    " float p, int[] sizes, int[] offsets) -> (Tensor out, Tensor lse)"
)
define(
    "flash_dropout_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " bool causal, float scale, Tensor seed, int op_id, float p, int[] sizes, int[] offsets)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)

Dropout = Callable[..., Tensor]
"""With the arguments of `counter_dropout`."""


def sdpa_dropout_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    seed: Tensor | None,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    offsets: Sequence[int],
    *,
    dropout: Dropout = counter_dropout,
) -> tuple[Tensor, Tensor]:
    """Explicit attention: any device, any widths, also the decomposition for a compiler. O(B H S T)
    memory. Without probability it is `autopar::sdpa`."""
    start = offsets[2] if causal else 0
    if p == 0.0:
        return tuple(own.sdpa(q, k, v, None, causal, scale, start))
    drop = _drop(dropout, q, k, seed, op_id, p, sizes, offsets)
    return sdpa_math(q, k, v, None, causal, scale, start, drop)


def sdpa_dropout_backward_math(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    seed: Tensor | None,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    offsets: Sequence[int],
    *,
    dropout: Dropout = counter_dropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Explicit gradient of :func:`sdpa_dropout_math`."""
    start = offsets[2] if causal else 0
    saved = (dout, q, k, v, None, out, lse, causal, scale, start)
    if p == 0.0:
        return tuple(own.sdpa_backward(*saved))
    return sdpa_backward_math(*saved, _drop(dropout, q, k, seed, op_id, p, sizes, offsets))


def _drop(
    dropout: Dropout,
    q: Tensor,
    k: Tensor,
    seed: Tensor | None,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    offsets: Sequence[int],
) -> Drop:
    if seed is None:
        raise ValueError("autopar::sdpa_dropout has no seed outside of a captured graph")
    keys = k.shape[2]
    geometry = ([*sizes, keys], [*q.shape[:3], keys], [*offsets, 0], 3)
    return lambda x: dropout(x, seed, op_id, p, *geometry)


def has_kernel_for(q: Tensor, k: Tensor, v: Tensor, p: float) -> bool:
    """Whether `autopar::flash_dropout` takes the call on its device."""
    narrow = q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    width = q.shape[3]
    fits = width == k.shape[3] == v.shape[3] and width % 8 == 0 and 16 <= width <= 128
    drops = 0.0 < p < 1.0 and bool(q.numel()) and bool(k.numel())
    return q.device.type == "cuda" and narrow and fits and drops and has_triton()


def _flash_math(*args: Any) -> tuple[Tensor, Tensor]:
    """For devices without the kernel."""
    out, lse = sdpa_dropout_math(*args)
    return out.transpose(1, 2).contiguous(), lse


def _flash_backward_math(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.transpose(1, 2).contiguous() for t in sdpa_dropout_backward_math(*args))
    return dq, dk, dv


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from autopar.ops.attention_kernel import forward

    q, k, v = map(with_dense_rows, (q, k, v))
    return forward(q, k, v, *rest)


def _flash_backward_cuda(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from autopar.ops.attention_kernel import backward

    dout, q, k, v, out = map(with_dense_rows, (dout, q, k, v, out))
    return backward(dout, q, k, v, out, lse.contiguous(), *rest)


def _sdpa_cuda(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not has_kernel_for(q, k, v, rest[4]):
        return sdpa_dropout_math(q, k, v, *rest)
    out, lse = _flash_cuda(q, k, v, *rest)
    return out.transpose(1, 2).contiguous(), lse


def _sdpa_backward_cuda(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_kernel_for(q, k, v, rest[6]):
        return sdpa_dropout_backward_math(dout, q, k, v, *rest)
    grads = _flash_backward_cuda(dout, q, k, v, *rest)
    dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in grads)
    return dq, dk, dv


def _flash_fake(q: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))
    return q.new_empty(batch, queries, heads, width), lse


def _flash_backward_fake(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.transpose(1, 2).shape) for t in (q, k, v))
    return dq, dk, dv


def _backward_fake(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, seed, *ctx.constants = inputs
    ctx.mask = (causal, scale)
    ctx.save_for_backward(q, k, v, *output, seed)


def _grad(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    """lse is for backward only, as that of `autopar::sdpa`."""
    *saved, seed = ctx.saved_tensors
    grads = own.sdpa_dropout_backward(dout, *saved, *ctx.mask, seed, *ctx.constants)
    return (*grads, None, None, None, *(None for _ in ctx.constants))


LIBRARY.impl("sdpa_dropout", sdpa_dropout_math, "CompositeExplicitAutograd")
LIBRARY.impl("sdpa_dropout_backward", sdpa_dropout_backward_math, "CompositeExplicitAutograd")
LIBRARY.impl("sdpa_dropout", _sdpa_cuda, "CUDA")
LIBRARY.impl("sdpa_dropout_backward", _sdpa_backward_cuda, "CUDA")
LIBRARY.impl("flash_dropout", _flash_math, "CompositeExplicitAutograd")
LIBRARY.impl("flash_dropout_backward", _flash_backward_math, "CompositeExplicitAutograd")
LIBRARY.impl("flash_dropout", _flash_cuda, "CUDA")
LIBRARY.impl("flash_dropout_backward", _flash_backward_cuda, "CUDA")
torch.library.register_fake("autopar::flash_dropout", _flash_fake, lib=LIBRARY)
torch.library.register_fake("autopar::flash_dropout_backward", _flash_backward_fake, lib=LIBRARY)
torch.library.register_fake("autopar::sdpa_dropout", sdpa_fake, lib=LIBRARY)
torch.library.register_fake("autopar::sdpa_dropout_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "autopar::sdpa_dropout", _grad, setup_context=_setup_context, lib=LIBRARY
)
register_flop_formula(own.sdpa_dropout)(sdpa_flops)
register_flop_formula(own.sdpa_dropout_backward)(sdpa_backward_flops)
