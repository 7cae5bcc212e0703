"""Reductions: a sharded reduced dim leaves a pending sum; maxima keep the dim whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule

aten = torch.ops.aten


def reduced_dims(call: Call, position: int = 1) -> set[int]:
    """The dims that the call reduces: an int, a list, or all of them."""
    rank = len(call.operands[0])
    dims = call.arg(position, "dim")
    if dims is None or dims == ():  # lists are frozen to tuples
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()


def _letters(call: Call, dims: set[int]) -> tuple[list[str], list[list[str]]]:
    letters = [f"d{i}" for i in range(len(call.operands[0]))]
    results = []
    for meta in call.results:
        keep = meta is not None and len(meta.shape) == len(letters)
        results.append(
            [c if i not in dims else "." for i, c in enumerate(letters) if keep or i not in dims]
        )
    return letters, results


def _sum(call: Call) -> Rule:
    dims = reduced_dims(call)
    letters, results = _letters(call, dims)
    reduced = {letters[d] for d in dims}
    return letter_rule(
        call, [letters], results, reduction=reduced, linear=[(0,)], zeros_add_nothing=True
    )


def _mean(call: Call) -> Rule:
    """As a sum; the lowering divides by the global count."""
    rule = _sum(call)
    factors = tuple(
        replace(f, lowering="mean") if f.splits and f.results[0] == -2 else f for f in rule.factors
    )
    return replace(rule, factors=factors)


def _whole_at(position: int) -> RuleFn:
    """The reduced dims, an argument at `position`, stay whole: maxima, products, variances,
    norms."""

    def rule(call: Call) -> Rule:
        dims = reduced_dims(call, position)
        letters, results = _letters(call, dims)
        return letter_rule(call, [letters], results, blocked={letters[d] for d in dims})

    return rule


_whole = _whole_at(1)


def _one_dim(position: int) -> RuleFn:
    """As `_whole_at` where a missing dim means the last one."""

    def rule(call: Call) -> Rule:
        rank = len(call.operands[0])
        dims = {call.arg(position, "dim", -1) % rank} if rank else set()
        letters, results = _letters(call, dims)
        return letter_rule(call, [letters], results, blocked={letters[d] for d in dims})

    return rule


def _whole_all(call: Call) -> Rule:
    letters = [f"d{i}" for i in range(len(call.operands[0]))]
    return letter_rule(call, [letters], [[] for _ in call.results], blocked=set(letters))


def _histc(call: Call) -> Rule:
    """Counts add up, if the bins are given: without bounds they come from the data."""
    letters = [f"d{i}" for i in range(len(call.operands[0]))]
    bounded = call.arg(2, "min", 0) != call.arg(3, "max", 0)
    blocked = set() if bounded else set(letters)
    return letter_rule(call, [letters], [["."]], reduction=set(letters), blocked=blocked)


RULES: Mapping[object, RuleFn] = {
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.amax.default: _whole,
    aten.amin.default: _whole,
    aten.max.dim: _whole,
    aten.min.dim: _whole,
    aten.argmax.default: _whole,
    aten.argmin.default: _whole,
    aten.any.dim: _whole,
    aten.all.dim: _whole,
    aten.any.dims: _whole,
    aten.all.dims: _whole,
    aten.prod.dim_int: _whole,
    aten.logsumexp.default: _whole,
    aten.var.correction: _whole,
    aten.std.correction: _whole,
    aten.var_mean.correction: _whole,
    aten.std_mean.correction: _whole,
    aten.aminmax.default: _whole_at(99),  # keyword only
    aten.linalg_vector_norm.default: _whole_at(2),
    aten.norm.ScalarOpt_dim: _whole_at(2),
    aten.median.dim: _whole,
    aten.count_nonzero.dim_IntList: _whole,
    aten.kthvalue.default: _one_dim(2),
    aten.prod.default: _whole_all,
    aten.norm.Scalar: _whole_all,
    aten.histc.default: _histc,
    aten.max.default: _whole_all,
    aten.min.default: _whole_all,
    aten.any.default: _whole_all,
    aten.all.default: _whole_all,
}
