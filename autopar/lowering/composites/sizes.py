"""Constants of a call that hold sizes or positions: they become those of the shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.graph.program import Ref
from autopar.layout import Offset, atom_offsets, flat_atoms, local_atoms
from autopar.lowering.composites.site import Lowering, Site
from autopar.sharding.rules.pooling import RESAMPLE_BACKWARD

aten = torch.ops.aten


def _reshape(site: Site) -> tuple[Ref, ...]:
    return (site.emit.compute(aten.reshape.default, site.locals[0], site.result_shape()),)


def _expand(site: Site) -> tuple[Ref, ...]:
    return (site.emit.compute(aten.expand.default, site.locals[0], site.result_shape()),)


def _sized(position: int) -> Lowering:
    """The argument at `position` is the result's shape."""

    def lower(site: Site) -> tuple[Ref, ...]:
        return site.call_with({position: site.result_shape()})

    return lower


def _group_norm(site: Site) -> tuple[Ref, ...]:
    n, c, *_ = site.operand_shape(0)
    return site.call_with({3: n, 4: c, 6: site.result_shape(1)[1]})


def _group_norm_backward(site: Site) -> tuple[Ref, ...]:
    n, c, *_ = site.operand_shape(0)
    return site.call_with({5: n, 6: c, 8: site.operand_shape(2)[1]})


def _convolution(site: Site) -> tuple[Ref, ...]:
    return site.call_with({8: _local_groups(site, 8, image=0)})


def _convolution_backward(site: Site) -> tuple[Ref, ...]:
    groups = {9: _local_groups(site, 9, image=1)}
    if site.call.args[3] is None:
        return site.call_with(groups)
    return site.call_with({3: [site.operand_shape(0)[1]], **groups})


def _local_groups(site: Site, position: int, image: int) -> int:
    """Groups of the channels that are here. Without groups a share of the channels is one group."""
    groups: int = site.call.args[position]
    return groups * site.operand_shape(image)[1] // site.call.shape(image)[1] if groups > 1 else 1


def _arange(site: Site) -> tuple[Ref, ...]:
    """Every overload becomes arange.start_step over this shard's part of the range."""
    args = site.call.args
    start, step = (args[0], 1) if len(args) > 1 else (0, 1)
    if len(args) > 2:
        step = args[2]
    dims = site.rule.results[0] or ()
    offset = site.offset(dims, site.strategy.results[0], 0)
    length = site.result_shape()[0]
    begin = Offset(tuple(s * step for s in offset.strides), start)
    end = Offset(begin.strides, start + length * step)
    return (site.emit.compute(aten.arange.start_step, begin, end, step, **site.kwargs()),)


def _dropout(site: Site) -> tuple[Ref, ...]:
    dims, layout = site.call.operands[0], site.strategy.operands[0]
    rows = sum(map(len, dims[:-1]))
    local = list(local_atoms(dims, layout, site.mesh))
    offsets = list(atom_offsets(dims, layout, site.mesh))
    return site.call_with({4: list(flat_atoms(dims)), 5: local, 6: offsets, 7: rows})


LOWERINGS: Mapping[object, Lowering] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.expand.default: _expand,
    aten.full.default: _sized(0),
    aten.zeros.default: _sized(0),
    aten.ones.default: _sized(0),
    aten.empty.memory_format: _sized(0),
    aten.new_zeros.default: _sized(1),
    aten.new_ones.default: _sized(1),
    aten.new_full.default: _sized(1),
    aten.new_empty.default: _sized(1),
    aten.slice_backward.default: _sized(1),
    aten.select_backward.default: _sized(1),
    aten.unfold_backward.default: _sized(1),
    aten.diagonal_backward.default: _sized(1),
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    torch.ops.autopar.dropout.default: _dropout,
    **dict.fromkeys(RESAMPLE_BACKWARD, _sized(2)),
}
