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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autopar.ops.attention import (
    Drop,
    sdpa_backward_flops,
    sdpa_backward_math,
    sdpa_fake,
    sdpa_flops,
    sdpa_math,
)
from autopar.ops.library import LIBRARY, define
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
torch.library.register_fake("autopar::sdpa_dropout", sdpa_fake, lib=LIBRARY)
torch.library.register_fake("autopar::sdpa_dropout_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "autopar::sdpa_dropout", _grad, setup_context=_setup_context, lib=LIBRARY
)
register_flop_formula(own.sdpa_dropout)(sdpa_flops)
register_flop_formula(own.sdpa_dropout_backward)(sdpa_backward_flops)
