"""Batch norm over a sharded batch: statistics of the global batch, as on a single device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from autopar.graph.program import Ref
from autopar.layout import shape_of
from autopar.lowering.composites.site import Lowering, Site
from autopar.lowering.emitter import Emitter

aten = torch.ops.aten


def _per_channel(emit: Emitter, vector: Ref, rank: int) -> Ref:
    """[C] -> [1, C, 1, ..]."""
    return emit.compute(aten.reshape.default, vector, [1, -1, *([1] * (rank - 2))])


def _reduction(shape: tuple[int, ...]) -> tuple[int, int, list[int]]:
    """(rank, elements per channel, all dims but the channels)."""
    rank = len(shape)
    return rank, math.prod(shape) // shape[1], [d for d in range(rank) if d != 1]


def _cast(emit: Emitter, value: Ref, source: torch.dtype, target: torch.dtype) -> Ref:
    return value if source == target else emit.compute(aten._to_copy.default, value, dtype=target)


def _batch_norm(site: Site) -> tuple[Ref, ...]:
    """Over a sharded batch two passes: mean, then centred squares. The running variance uses
    N / (N - 1) of the global N. Sums run in the dtype of the statistics; where that is wider than
    the input's, torch's shape function does not know it, and the call is written out as well."""
    axes = site.strategy.axes("bn")
    if not axes and site.call.result(1).dtype == site.call.dtypes[0]:
        return site.call_with({})
    emit = site.emit
    x, weight, bias, running_mean, running_var = site.args()[:5]
    momentum, eps = site.call.args[6], site.call.args[7]
    rank, count, dims = _reduction(shape_of(site.call.operands[0]))
    stats_dtype = site.call.result(1).dtype
    x = _cast(emit, x, site.call.dtypes[0], stats_dtype)
    if axes:
        total = emit.all_reduce(emit.compute(aten.sum.dim_IntList, x, dims), axes)
        mean = emit.compute(aten.div.Scalar, total, count)
    else:
        both = emit.compute(aten.var_mean.correction, x, dims, correction=0)
        var, mean = Ref(both.name, 0), Ref(both.name, 1)
    centred = emit.compute(aten.sub.Tensor, x, _per_channel(emit, mean, rank))
    centred = site.fill(centred, 0)  # zeros less the mean are no zeros
    if axes:
        square = emit.compute(aten.mul.Tensor, centred, centred)
        squares = emit.all_reduce(emit.compute(aten.sum.dim_IntList, square, dims), axes)
        var = emit.compute(aten.div.Scalar, squares, count)
    invstd = emit.compute(aten.rsqrt.default, emit.compute(aten.add.Scalar, var, eps))
    y = emit.compute(aten.mul.Tensor, centred, _per_channel(emit, invstd, rank))
    if weight is not None:
        y = emit.compute(aten.mul.Tensor, y, _per_channel(emit, weight, rank))
    if bias is not None:
        y = emit.compute(aten.add.Tensor, y, _per_channel(emit, bias, rank))
    unbiased = emit.compute(aten.mul.Scalar, var, count / max(1, count - 1))
    return (
        _cast(emit, y, stats_dtype, site.call.result().dtype),
        mean,
        invstd,
        emit.compute(aten.lerp.Scalar, running_mean, mean, momentum),
        emit.compute(aten.lerp.Scalar, running_var, unbiased, momentum),
    )


def _batch_norm_backward(site: Site) -> tuple[Ref, ...]:
    """dx = w s (dy - mean(dy) - xhat mean(dy xhat)), means over the global batch."""
    axes = site.strategy.axes("bn")
    if not axes:
        return site.call_with({})
    emit = site.emit
    dy, x, weight, _, _, mean, invstd = site.args()[:7]
    rank, count, dims = _reduction(shape_of(site.call.operands[1]))
    stats_dtype = site.call.dtypes[-1]
    dy = _cast(emit, dy, site.call.dtypes[0], stats_dtype)
    x = _cast(emit, x, site.call.dtypes[1], stats_dtype)
    centred = emit.compute(aten.sub.Tensor, x, _per_channel(emit, mean, rank))
    xhat = emit.compute(aten.mul.Tensor, centred, _per_channel(emit, invstd, rank))
    db = emit.compute(aten.sum.dim_IntList, dy, dims)
    dw = emit.compute(aten.sum.dim_IntList, emit.compute(aten.mul.Tensor, dy, xhat), dims)
    mean_dy = emit.compute(aten.div.Scalar, emit.all_reduce(db, axes), count)
    mean_dy_xhat = emit.compute(aten.div.Scalar, emit.all_reduce(dw, axes), count)
    dx = emit.compute(aten.sub.Tensor, dy, _per_channel(emit, mean_dy, rank))
    along = emit.compute(aten.mul.Tensor, xhat, _per_channel(emit, mean_dy_xhat, rank))
    dx = emit.compute(aten.sub.Tensor, dx, along)
    dx = emit.compute(aten.mul.Tensor, dx, _per_channel(emit, invstd, rank))
    if weight is not None:
        dx = emit.compute(aten.mul.Tensor, dx, _per_channel(emit, weight, rank))
    return tuple(
        ref if meta is None else _cast(emit, ref, stats_dtype, meta.dtype)
        for ref, meta in zip((dx, dw, db), site.call.results, strict=True)
    )


LOWERINGS: Mapping[object, Lowering] = {
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}
