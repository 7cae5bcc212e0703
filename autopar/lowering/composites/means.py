"""Means over a sharded dim: the local sum over the global count."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from autopar.graph.program import Ref
from autopar.layout import shape_of
from autopar.lowering.composites.site import Lowering, Site
from autopar.sharding.rules.loss import ELEMENTWISE_LOSSES, REDUCTION_SUM, reduction_position

aten = torch.ops.aten


def _mean(site: Site) -> tuple[Ref, ...]:
    """Local sum over the global count."""
    if not site.strategy.axes("mean"):
        return site.call_with({})
    whole = math.prod(shape_of(site.call.operands[0]))
    count = whole // max(1, math.prod(site.call.result().shape))
    args = site.args()
    target = aten.sum.default if site.op.target is aten.mean.default else aten.sum.dim_IntList
    total = site.emit.compute(target, *args, **site.kwargs())
    return (site.emit.compute(aten.div.Scalar, total, count),)


def _mean_loss(site: Site) -> tuple[Ref, ...]:
    """An elementwise loss, or its backward: as a sum, over the global count."""
    if not site.strategy.axes("mean_loss"):
        return site.call_with({})
    position = reduction_position(site.call)
    count = math.prod(shape_of(site.call.operands[1]))
    args = site.args()
    args += [a.default_value for a in _schema_arguments(site)[len(args) : position + 1]]
    args[position] = REDUCTION_SUM
    total = site.emit.compute(site.op.target, *args)
    return (site.emit.compute(aten.div.Scalar, total, count),)


def _schema_arguments(site: Site) -> list[torch.Argument]:
    return list(site.op.target._schema.arguments)  # type: ignore[attr-defined]


LOWERINGS: Mapping[object, Lowering] = {
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    **dict.fromkeys(ELEMENTWISE_LOSSES, _mean_loss),
}
