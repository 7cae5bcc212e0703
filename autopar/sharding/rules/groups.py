"""The factor that gives each device whole groups of channels: group norm, grouped convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from autopar.layout import REPLICATE, first_atom
from autopar.sharding.rule import Call, Factor, Rule


def with_groups(
    call: Call,
    rule: Rule,
    groups: int,
    operand_dims: Sequence[int],
    result_dims: Sequence[int],
    name: str = "c",
) -> Rule:
    """Adds the factor `name`. dims: of each operand and result the one with channels or groups, in
    contiguous groups; results that do not exist have any. A size of `groups` = 1 gives none."""
    operands = [first_atom(d, dim) for d, dim in zip(call.operands, operand_dims, strict=True)]
    results = [
        REPLICATE if dims is None else first_atom(dims, dim)
        for dims, dim in zip(rule.results, result_dims, strict=True)
    ]
    placed = [a for a in operands if a is not None], [a for a in results if a is not None]
    if groups == 1 or len(placed[0]) < len(operands) or len(placed[1]) < len(results):
        return rule
    firsts = [d[dim][0] for d, dim in zip(call.operands, operand_dims, strict=True)]
    fill = (None,) * len(operands)
    size = math.gcd(groups, *firsts)
    factor = Factor(name, size, tuple(placed[0]), tuple(placed[1]), fill=fill)
    return replace(rule, factors=(*rule.factors, factor)) if factor.size > 1 else rule
