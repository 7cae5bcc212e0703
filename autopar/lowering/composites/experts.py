"""Experts on shards: those that are here, and rows that go to where their expert is.

An axis that shards tokens and experts exchanges rows: each device sorts its rows by expert, tells
the others how many they get, sends them, and gets results back in the same order. One hop per axis,
the major one first, since each narrows down the experts: after the last hop every row is on the
device that has its expert. Between the hops the number of rows is a value; operands and results
have static shapes. No row is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.graph.program import Ref
from autopar.layout import Offset
from autopar.lowering.composites.site import Lowering, Site
from autopar.lowering.emitter import Emitter
from autopar.lowering.program import CollectiveOp
from autopar.ops.experts import (
    arrived_experts,
    combine_rows,
    rows_per_device,
    sort_rows,
    take_rows,
    unsort_rows,
)
from autopar.sharding.rules.experts import EXCHANGE

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Hop:
    """How rows went along one axis. order: the slot that each of them had before."""

    axis: int
    order: Ref
    sends: Ref
    receives: Ref


@dataclass(frozen=True, slots=True)
class _Table:
    """Rows to send: row s // slots for slot s."""

    rows: Ref
    slots: int


def _send(
    site: Site, index: Ref, experts: int, tables: Sequence[_Table]
) -> tuple[list[_Hop], Ref, list[Ref]]:
    """(hops, local expert [R, 1] of each row that arrived, the rows of each table)."""
    emit, hops = site.emit, []
    rows = [table.rows for table in tables]
    slots = [table.slots for table in tables]
    for axis in site.strategy.axes(EXCHANGE):
        size = site.mesh[axis]
        here = experts // size  # experts that each coordinate goes on with
        order = emit.compute(sort_rows, index, experts)
        counts = Ref(order.name, 1)
        arriving = emit.communicate(CollectiveOp.ALL_TO_ALL, counts, axis)
        sends, receives = (emit.compute(rows_per_device, c, size) for c in (counts, arriving))
        hops.append(_Hop(axis, order, sends, receives))
        picked = [emit.compute(take_rows, r, order, n) for r, n in zip(rows, slots, strict=True)]
        rows = [emit.exchange(r, sends, receives, axis) for r in picked]
        index = emit.compute(arrived_experts, arriving, rows[0], size)
        experts, slots = here, [1] * len(rows)
    return hops, index, rows


def _send_back(emit: Emitter, hops: Sequence[_Hop], rows: Ref) -> Ref:
    """Results where their rows came from, in the order in which these left the first time."""
    for number, hop in reversed(list(enumerate(hops))):
        rows = emit.exchange(rows, hop.receives, hop.sends, hop.axis)
        if number:
            rows = emit.compute(unsort_rows, rows, hop.order)
    return rows


def _experts(site: Site) -> tuple[Ref, ...]:
    x, index, weight, up, down, activation, _, num_experts = site.args()
    if not site.strategy.axes(EXCHANGE):
        return site.call_with({6: _first_expert(site, 3)})
    emit, slots = site.emit, site.operand_shape(1)[1]
    hops, local, (rows,) = _send(site, index, num_experts, [_Table(x, slots)])
    once = emit.compute(aten.type_as.default, emit.compute(aten.ones_like.default, local), x)
    here = site.operand_shape(3)[0]
    out = emit.compute(site.op.target, rows, local, once, up, down, activation, 0, here)
    return (emit.compute(combine_rows, _send_back(emit, hops, out), hops[0].order, weight),)


def _experts_backward(site: Site) -> tuple[Ref, ...]:
    """Weight gradients are those of all rows that came, from all devices of the axis."""
    dout, x, index, weight, up, down, activation, _, num_experts = site.args()
    if not site.strategy.axes(EXCHANGE):
        return site.call_with({7: _first_expert(site, 4)})
    emit, shape = site.emit, site.operand_shape(3)
    column = emit.compute(aten.reshape.default, weight, [-1, 1])
    tables = [_Table(dout, shape[1]), _Table(x, shape[1]), _Table(column, 1)]
    hops, local, (drows, rows, scale) = _send(site, index, num_experts, tables)
    here = site.operand_shape(4)[0]
    grads = emit.compute(site.op.target, drows, rows, local, scale, up, down, activation, 0, here)
    dx, dweight, dup, ddown = (Ref(grads.name, i) for i in range(4))
    dx, dweight = (_send_back(emit, hops, ref) for ref in (dx, dweight))
    order, ones = hops[0].order, emit.compute(aten.ones_like.default, weight)
    dweight = emit.compute(unsort_rows, dweight, order)
    return (
        emit.compute(combine_rows, dx, order, ones),
        emit.compute(aten.reshape.default, dweight, shape),
        dup,
        ddown,
    )


def _first_expert(site: Site, up: int) -> Offset:
    """The number of the first expert of this shard."""
    return site.offset(site.call.operands[up], site.strategy.operands[up], 0)


LOWERINGS: Mapping[object, Lowering] = {
    torch.ops.autopar.experts.default: _experts,
    torch.ops.autopar.experts_backward.default: _experts_backward,
}
