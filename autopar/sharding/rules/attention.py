"""Scaled dot-product attention: batch, heads and queries are parallel.

With fewer key and value heads than query heads, h query heads are g groups: shards hold whole
groups. A shard of the queries attends to all keys and values, which are gathered (the context
parallelism of Llama 3, arXiv 2407.21783, section 3.3.2); their gradients are pending sums. Sharding
heads instead, from a sharded sequence and back by all-to-all (DeepSpeed Ulysses, arXiv 2309.14509),
needs no factor of its own: it is factor h between two reshards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from autopar.layout import PARTIAL, REPLICATE, Dims, first_atom, raw_dims
from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Factor, Rule, linear_factors


def _factor(
    call: Call,
    name: str,
    dim: int,
    operands: Collection[int],
    bias: int | None,
    results: Sequence[Dims | None],
    *,
    partial: Collection[int] = (),
    lowering: str = "",
) -> Factor | None:
    """The factor that shards `dim` of these operands and of every result that is not `partial`. A
    bias of size 1 is replicated. Padding adds zero to what is partial where it is zero."""
    placed = [REPLICATE] * len(call.operands)
    sizes = []
    for number in operands:
        atom = first_atom(call.operands[number], dim)
        if atom is None:
            return None
        placed[number] = atom
        sizes.append(call.operands[number][dim][0])
    if bias is not None and (atom := first_atom(call.operands[bias], dim)) is not None:
        placed[bias] = atom
        sizes.append(call.operands[bias][dim][0])
    outcomes = [PARTIAL if index in partial else REPLICATE for index in range(len(results))]
    for index, dims in enumerate(results):
        if dims is not None and index not in partial:
            atom = first_atom(dims, dim)
            if atom is None:
                return None
            outcomes[index] = atom
            sizes.append(dims[dim][0])
    size = math.gcd(*sizes)
    if size == 1:
        return None
    fill = tuple(0.0 if partial and atom != REPLICATE else None for atom in placed)
    return Factor(name, size, tuple(placed), tuple(outcomes), lowering=lowering, fill=fill)


def _raw_results(call: Call) -> list[Dims | None]:
    return [raw_dims(m.shape) if m is not None else None for m in call.results]


def _sdpa(call: Call) -> Rule:
    """(q [b h s d], k [b g t d], v [b g t d], bias?, causal, scale) -> (out [b h s d], lse [b h
    s])."""
    results = _raw_results(call)
    bias = 3 if len(call.operands) == 4 else None
    causal = "causal" if call.args[4] else ""
    factors = (
        _factor(call, "b", 0, range(3), bias, results),
        _factor(call, "h", 1, range(3), bias, results),
        _factor(call, "s", 2, (0,), bias, results, lowering=causal),
    )
    return Rule(tuple(results), tuple(f for f in factors if f is not None))


def _sdpa_backward(call: Call) -> Rule:
    """(dout, q, k, v, bias?, out, lse, causal, scale) -> (dq, dk, dv): linear in dout."""
    results = _raw_results(call)
    biased = len(call.operands) == 7
    bias = 4 if biased else None
    saved = (5, 6) if biased else (4, 5)
    causal = "causal" if call.args[7] else ""
    queries = (0, 1, *saved)
    factors = (
        _factor(call, "b", 0, (0, 1, 2, 3, *saved), bias, results),
        _factor(call, "h", 1, (0, 1, 2, 3, *saved), bias, results),
        _factor(call, "s", 2, queries, bias, results, partial=(1, 2), lowering=causal),
    )
    linear = linear_factors(call, [(0,)])
    return Rule(tuple(results), (*(f for f in factors if f is not None), *linear))


def _sdpa_dropout(call: Call) -> Rule:
    """(q, k, v, causal, scale, seed, ..) -> (out, lse); every shard has the offsets of its own."""
    results = _raw_results(call)
    factors = (
        _factor(call, "b", 0, range(3), None, results),
        _factor(call, "h", 1, range(3), None, results),
        _factor(call, "s", 2, (0,), None, results),
    )
    return Rule(tuple(results), tuple(f for f in factors if f is not None))


def _sdpa_dropout_backward(call: Call) -> Rule:
    """(dout, q, k, v, out, lse, causal, scale, seed, ..) -> (dq, dk, dv): linear in dout."""
    results = _raw_results(call)
    factors = (
        _factor(call, "b", 0, range(6), None, results),
        _factor(call, "h", 1, range(6), None, results),
        _factor(call, "s", 2, (0, 1, 4, 5), None, results, partial=(1, 2)),
    )
    linear = linear_factors(call, [(0,)])
    return Rule(tuple(results), (*(f for f in factors if f is not None), *linear))


RULES: Mapping[object, RuleFn] = {
    torch.ops.autopar.sdpa.default: _sdpa,
    torch.ops.autopar.sdpa_backward.default: _sdpa_backward,
    torch.ops.autopar.sdpa_dropout.default: _sdpa_dropout,
    torch.ops.autopar.sdpa_dropout_backward.default: _sdpa_dropout_backward,
}
