"""Attention of a shard: causal, it starts at the shard's first query; dropout starts at the
shard's first row, head and query."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.graph.program import Ref
from autopar.lowering.composites.site import Lowering, Site

_QUERY_DIM = 2


def _causal(query: int) -> Lowering:
    """query: the operand that holds the queries, [B, H, S, D]."""

    def lower(site: Site) -> tuple[Ref, ...]:
        if not site.strategy.axes("causal"):
            return site.call_with({})
        start = site.offset(site.call.operands[query], site.strategy.operands[query], _QUERY_DIM)
        kwargs = {**site.kwargs(), "first_query": start}
        return site.results(site.emit.compute(site.op.target, *site.args(), **kwargs))

    return lower


def _dropout(query: int) -> Lowering:
    """query: as above. The offsets are the last argument."""

    def lower(site: Site) -> tuple[Ref, ...]:
        dims, layout = site.call.operands[query], site.strategy.operands[query]
        starts = [site.offset(dims, layout, dim) for dim in range(_QUERY_DIM + 1)]
        return site.call_with({len(site.call.args) - 1: starts})

    return lower


LOWERINGS: Mapping[object, Lowering] = {
    torch.ops.autopar.sdpa.default: _causal(0),
    torch.ops.autopar.sdpa_backward.default: _causal(1),
    torch.ops.autopar.sdpa_dropout.default: _dropout(0),
    torch.ops.autopar.sdpa_dropout_backward.default: _dropout(1),
}
