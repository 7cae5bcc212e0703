"""Scaled dot-product attention: batch and heads are parallel, sequence and head dims stay whole.

With fewer key and value heads than query heads, h query heads are g groups: shards hold whole
groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from autopar.layout import REPLICATE, Dims, raw_dims
from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Factor, Rule, linear_factors


def _attention_factors(
    call: Call, tensors: list[int], bias: int | None, results: list[Dims | None]
) -> list[Factor]:
    """Factors b (dim 0) and h (dim 1) of every operand in `tensors`; a bias of size 1 is
    replicated."""
    factors = []
    for name, dim in (("b", 0), ("h", 1)):
        operands = [REPLICATE] * len(call.operands)
        sizes = []
        for i in tensors:
            atoms = call.operands[i][dim]
            if not atoms:
                break
            operands[i] = sum(map(len, call.operands[i][:dim]))
            sizes.append(atoms[0])
        else:
            if bias is not None and call.operands[bias][dim]:
                operands[bias] = sum(map(len, call.operands[bias][:dim]))
                sizes.append(call.operands[bias][dim][0])
            placed = [REPLICATE if dims is None else sum(map(len, dims[:dim])) for dims in results]
            size = math.gcd(*sizes, *(dims[dim][0] for dims in results if dims is not None))
            if size > 1:
                fill = (None,) * len(operands)
                factors.append(Factor(name, size, tuple(operands), tuple(placed), fill=fill))
    return factors


def _sdpa(call: Call) -> Rule:
    """(q [b h s d], k [b g t d], v [b g t d], bias?, causal, scale) -> (out [b h s d], lse [b h
    s])."""
    results: list[Dims | None] = [
        raw_dims(m.shape) if m is not None else None for m in call.results
    ]
    bias = 3 if len(call.operands) == 4 else None
    return Rule(tuple(results), tuple(_attention_factors(call, [0, 1, 2], bias, results)))


def _sdpa_backward(call: Call) -> Rule:
    """(dout, q, k, v, bias?, out, lse, causal, scale) -> (dq, dk, dv): linear in dout."""
    results: list[Dims | None] = [
        raw_dims(m.shape) if m is not None else None for m in call.results
    ]
    biased = len(call.operands) == 7
    tensors = [0, 1, 2, 3, *([5, 6] if biased else [4, 5])]
    factors = _attention_factors(call, tensors, 4 if biased else None, results)
    return Rule(tuple(results), (*factors, *linear_factors(call, [(0,)])))


RULES: Mapping[object, RuleFn] = {
    torch.ops.autopar.sdpa.default: _sdpa,
    torch.ops.autopar.sdpa_backward.default: _sdpa_backward,
}
