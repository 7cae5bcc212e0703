"""Lowerings that are more than the same call on shards, by family.

Constants that hold sizes become local ones; positions and masks get the offset of the shard;
composites add collectives of their own (vocab-parallel loss and embedding, batch norm over a
sharded batch, rows that go to their experts) or divide by a global count.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import autopar.ops  # noqa: F401  (registers the operators that the rows below name)
from autopar.errors import InternalError
from autopar.graph.program import Ref
from autopar.lowering.composites import attention, batch_norm, experts, means, sizes, vocabulary
from autopar.lowering.composites.site import Lowering, Site

__all__ = ["LOWERINGS", "Lowering", "Site", "lower_call"]

LOWERINGS: Mapping[object, Lowering] = MappingProxyType(
    {
        **sizes.LOWERINGS,
        **means.LOWERINGS,
        **vocabulary.LOWERINGS,
        **batch_norm.LOWERINGS,
        **attention.LOWERINGS,
        **experts.LOWERINGS,
    }
)


def lower_call(site: Site) -> tuple[Ref, ...]:
    """Local values of the results, in the strategy's layouts."""
    lowering = LOWERINGS.get(site.op.target)
    if lowering is not None:
        return lowering(site)
    composite = {f.lowering for f in site.strategy.factors if f is not None} - {""}
    if composite:
        raise InternalError(f"no lowering for {site.op} with {composite}")
    return site.call_with({})
