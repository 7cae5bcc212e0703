"""A sharded vocabulary: masked embedding lookups and the vocab-parallel cross-entropy.

Each device holds a run of rows or classes; indices are global. What is elsewhere counts zero and
the sums over the axes are all-reduced inside, or left pending.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from autopar.graph.program import Ref
from autopar.layout import Offset
from autopar.lowering.composites.site import Lowering, Site
from autopar.lowering.emitter import CPU, Emitter
from autopar.ops.attention import accumulation_dtype
from autopar.sharding.rules.loss import REDUCTION_MEAN, REDUCTION_NONE

aten, own = torch.ops.aten, torch.ops.autopar


def _cast(emit: Emitter, value: Ref, source: torch.dtype, target: torch.dtype) -> Ref:
    """Sums run in the accumulation dtype, as inside the kernels."""
    return value if source == target else emit.compute(aten._to_copy.default, value, dtype=target)


def _log_softmax(site: Site) -> tuple[Ref, ...]:
    """x - max - log(sum exp(x - max)), maximum and sum over the axes that shard the class dim."""
    axes = site.strategy.axes("vp")
    if not axes:
        return site.call_with({})
    emit, (x,), dim = site.emit, site.locals, site.call.args[1]
    x = _cast(emit, x, site.call.dtypes[0], accumulation_dtype(site.call.dtypes[0]))
    top = emit.all_reduce(emit.compute(aten.amax.default, x, [dim], True), axes, "max")
    centred = emit.compute(aten.sub.Tensor, x, top)
    exp = emit.compute(aten.exp.default, centred)
    total = emit.all_reduce(emit.compute(aten.sum.dim_IntList, exp, [dim], True), axes)
    out = emit.compute(aten.sub.Tensor, centred, emit.compute(aten.log.default, total))
    return (_cast(emit, out, accumulation_dtype(site.call.dtypes[0]), site.call.result().dtype),)


def _log_softmax_backward(site: Site) -> tuple[Ref, ...]:
    """dx = dy - exp(y) sum(dy), the sum over the axes that shard the class dim."""
    axes = site.strategy.axes("vp")
    if not axes:
        return site.call_with({})
    emit, dim = site.emit, site.call.args[2]
    wide = accumulation_dtype(site.call.dtypes[0])
    dy, y = (
        _cast(emit, ref, dtype, wide)
        for ref, dtype in zip(site.locals, site.call.dtypes, strict=True)
    )
    total = emit.all_reduce(emit.compute(aten.sum.dim_IntList, dy, [dim], True), axes)
    scaled = emit.compute(aten.mul.Tensor, emit.compute(aten.exp.default, y), total)
    dx = emit.compute(aten.sub.Tensor, dy, scaled)
    return (_cast(emit, dx, wide, site.call.result().dtype),)


def _rows_here(
    emit: Emitter, index: Ref, start: Offset, length: int, ignore: int | None
) -> tuple[Ref, Ref]:
    """(index into this shard, mask of the rows that are elsewhere or ignored)."""
    local = emit.compute(aten.sub.Scalar, index, start)
    below = emit.compute(aten.lt.Scalar, local, 0)
    above = emit.compute(aten.ge.Scalar, local, length)
    absent = emit.compute(aten.logical_or.default, below, above)
    if ignore is not None:
        ignored = emit.compute(aten.eq.Scalar, index, ignore)
        absent = emit.compute(aten.logical_or.default, absent, ignored)
    return emit.compute(aten.masked_fill.Scalar, local, absent, 0), absent


def _nll(site: Site) -> tuple[Ref, ...]:
    """Each device picks the targets whose class it holds; the others count zero."""
    if not site.strategy.axes("vp"):
        return site.call_with({})
    emit, (x, target) = site.emit, site.locals
    dim = 1 if len(site.call.operands[0]) > 1 else 0
    ignore = site.call.args[4]
    start = site.offset(site.call.operands[0], site.strategy.operands[0], dim)
    local, absent = _rows_here(emit, target, start, site.operand_shape(0)[dim], ignore)
    picked = emit.compute(
        aten.gather.default, x, dim, emit.compute(aten.unsqueeze.default, local, dim)
    )
    picked = emit.compute(aten.squeeze.dim, picked, dim)
    loss = emit.compute(aten.neg.default, emit.compute(aten.masked_fill.Scalar, picked, absent, 0))
    counted = emit.compute(aten.ne.Scalar, target, ignore)
    dtype = site.call.result(1).dtype
    if site.call.args[3] == REDUCTION_NONE:  # the weight is not counted then
        return (loss, emit.compute(aten.zeros.default, [], dtype=dtype, device=CPU))
    loss = emit.compute(aten.sum.default, loss)
    return (loss, emit.compute(aten.sum.default, counted, dtype=dtype))


def _nll_backward(site: Site) -> tuple[Ref, ...]:
    if not site.strategy.axes("vp"):
        return site.call_with({})
    emit, (grad, x, target, total) = site.emit, site.locals
    dim = 1 if len(site.call.operands[1]) > 1 else 0
    start = site.offset(site.call.operands[1], site.strategy.operands[1], dim)
    local, absent = _rows_here(emit, target, start, site.operand_shape(1)[dim], site.call.args[5])
    if site.call.args[4] == REDUCTION_MEAN:
        grad = emit.compute(aten.div.Tensor, grad, total)
    down = emit.compute(aten.neg.default, grad)
    full = emit.compute(aten.expand.default, down, site.operand_shape(2))
    here = emit.compute(aten.masked_fill.Scalar, full, absent, 0)
    zeros = emit.compute(aten.zeros_like.default, x)
    at = emit.compute(aten.unsqueeze.default, local, dim)
    return (
        emit.compute(
            aten.scatter.src, zeros, dim, at, emit.compute(aten.unsqueeze.default, here, dim)
        ),
    )


def _cross_entropy(site: Site) -> tuple[Ref, ...]:
    """Maximum and sum over the axes that shard the classes; each device counts the rows whose
    target it holds. A device sums against its own maximum, so that both are found in one pass over
    x; where it has padding alone the sum is 0."""
    axes = site.strategy.axes("vp")
    if not axes:
        return site.call_with({})
    emit, (x, target), ignore = site.emit, site.locals, site.call.args[2]
    narrow = site.call.dtypes[0]
    sums = emit.compute(own.softmax_sums.default, x)
    local_top, local_total = sums, Ref(sums.name, 1)
    nothing = emit.compute(aten.eq.Scalar, local_top, -math.inf)
    local_total = emit.compute(aten.masked_fill.Scalar, local_total, nothing, 0)
    top = emit.all_reduce(local_top, axes, "max")
    scale = emit.compute(aten.exp.default, emit.compute(aten.sub.Tensor, local_top, top))
    total = emit.all_reduce(emit.compute(aten.mul.Tensor, local_total, scale), axes)
    lse = emit.compute(aten.add.Tensor, emit.compute(aten.log.default, total), top)
    start = site.offset(site.call.operands[0], site.strategy.operands[0], 1)
    local, absent = _rows_here(emit, target, start, site.operand_shape(0)[1], ignore)
    at = emit.compute(aten.unsqueeze.default, local, 1)
    picked = emit.compute(aten.gather.default, x, 1, at)
    picked = _cast(emit, picked, narrow, accumulation_dtype(narrow))
    rows = emit.compute(aten.squeeze.dim, emit.compute(aten.sub.Tensor, lse, picked), 1)
    loss = emit.compute(aten.sum.default, emit.compute(aten.masked_fill.Scalar, rows, absent, 0))
    counted = emit.compute(aten.ne.Scalar, target, ignore)
    count = emit.compute(aten.sum.default, counted, dtype=accumulation_dtype(narrow))
    return loss, count, emit.compute(aten.squeeze.dim, lse, 1)


def _cross_entropy_backward(site: Site) -> tuple[Ref, ...]:
    """No device needs more than its own classes: it counts from its first one."""
    if not site.strategy.axes("vp"):
        return site.call_with({})
    return site.call_with({5: site.offset(site.call.operands[1], site.strategy.operands[1], 1)})


def _embedding(site: Site) -> tuple[Ref, ...]:
    """Rows that are elsewhere give zeros; the sum over the axes is pending."""
    if not site.strategy.axes("vocab"):
        return site.call_with({})
    emit, (weight, index) = site.emit, site.locals
    start = site.offset(site.call.operands[0], site.strategy.operands[0], 0)
    local, absent = _rows_here(emit, index, start, site.operand_shape(0)[0], None)
    rows = emit.compute(aten.embedding.default, weight, local)
    mask = emit.compute(aten.unsqueeze.default, absent, -1)
    return (emit.compute(aten.masked_fill.Scalar, rows, mask, 0),)


def _embedding_backward(site: Site) -> tuple[Ref, ...]:
    rows = site.result_shape()[0]
    if not site.strategy.axes("vocab"):
        return site.call_with({2: rows})
    emit, (grad, index) = site.emit, site.locals
    padding = site.call.args[3]
    start = site.offset(site.rule.results[0] or (), site.strategy.results[0], 0)
    local, absent = _rows_here(emit, index, start, rows, padding if padding >= 0 else None)
    mask = emit.compute(aten.unsqueeze.default, absent, -1)
    here = emit.compute(aten.masked_fill.Scalar, grad, mask, 0)
    target = aten.embedding_dense_backward.default
    return (emit.compute(target, here, local, rows, -1, False),)


LOWERINGS: Mapping[object, Lowering] = {
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss2d_forward.default: _nll,
    aten.nll_loss_backward.default: _nll_backward,
    aten.nll_loss2d_backward.default: _nll_backward,
    own.cross_entropy.default: _cross_entropy,
    own.cross_entropy_backward.default: _cross_entropy_backward,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
}
