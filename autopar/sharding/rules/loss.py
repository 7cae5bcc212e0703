"""Losses. The class dim sharded is the composite "vp" (vocab-parallel); batch factors leave sums
pending.

Means are captured as sums and divisions, so that a denominator never comes from a local shape; the
losses that fuse the mean get the lowering "mean".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from autopar.layout import PARTIAL, REPLICATE, shape_of
from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Factor, Rule, letter_rule, replicate_rule
from autopar.sharding.rules.indexing import with_lowering

aten, own = torch.ops.aten, torch.ops.autopar

REDUCTION_NONE, REDUCTION_MEAN, REDUCTION_SUM = 0, 1, 2


def _nll_words(call: Call, logits: int) -> tuple[list[str], list[str]]:
    rank = len(call.operands[logits])
    rest = ["n"] if rank == 2 else [f"n{i}" for i in range(rank - 1)]
    return ([rest[0], "v", *rest[1:]] if rank > 1 else ["v"]), (rest if rank > 1 else [])


def _nll(call: Call) -> Rule:
    """(log_probabilities, target, weight?, reduction, ignore_index) -> (loss, total_weight)."""
    x, target = _nll_words(call, 0)
    weighted = len(call.operands) == 3
    words = [x, target, *([["w"]] if weighted else [])]
    reduction = call.args[3]
    loss = target if reduction == REDUCTION_NONE else []
    blocked = {"w"} | ({"v"} if weighted else set())
    if reduction == REDUCTION_MEAN:
        blocked |= set(x) | set(target)
    rule = letter_rule(call, words, [loss, []], reduction=set(target) | {"v"}, blocked=blocked)
    factors = []
    for factor in with_lowering(rule, "v", "vp").factors:
        if not factor.lowering:
            factor = replace(factor, fill=_ignored(factor, 1, call.args[4]))
        if factor.lowering or reduction == REDUCTION_NONE:
            # every device sees every target, or nobody counts: the weight is whole
            factor = replace(factor, results=(factor.results[0], REPLICATE))
        factors.append(factor)
    return replace(rule, factors=tuple(factors))


def _ignored(factor: Factor, target: int, ignore_index: int) -> tuple[float | None, ...] | None:
    """Targets in the padding are ignored ones: they give no loss and are not counted."""
    if not factor.splits:
        return None
    return tuple(ignore_index if i == target else None for i in range(len(factor.operands)))


def _nll_backward(call: Call) -> Rule:
    """(grad, log_probabilities, target, weight?, reduction, ignore_index, total_weight) -> dx."""
    x, target = _nll_words(call, 1)
    weighted = len(call.operands) == 5
    reduction = call.args[4]
    grad = target if reduction == REDUCTION_NONE else []
    words = [grad, x, target, *([["w"]] if weighted else []), []]
    blocked = {"w"} | ({"v"} if weighted else set())
    rule = letter_rule(call, words, [x], blocked=blocked, linear=[(0,)])
    factors = (
        f if f.lowering else replace(f, fill=_ignored(f, 2, call.args[5]))
        for f in with_lowering(rule, "v", "vp").factors
    )
    return replace(rule, factors=tuple(factors))


def _cross_entropy(call: Call) -> Rule:
    """(x [n, v], target [n], ignore_index) -> (loss, rows that count, lse [n])."""
    words, results = [["n", "v"], ["n"]], [[], [], ["n"]]
    rule = letter_rule(call, words, results, reduction={"n", "v"})
    factors = []
    for factor in with_lowering(rule, "v", "vp").factors:
        if factor.lowering:  # each target is in one device's classes; every device sees all rows
            results_here, fill = (PARTIAL, REPLICATE, REPLICATE), (-math.inf, None)
            factor = replace(factor, results=results_here, fill=fill)
        else:
            factor = replace(factor, fill=_ignored(factor, 1, call.args[2]))
        factors.append(factor)
    return replace(rule, factors=tuple(factors))


def _cross_entropy_backward(call: Call) -> Rule:
    """(grad, x [n, v], target [n], lse [n], ignore_index, first) -> dx [n, v]."""
    words = [[], ["n", "v"], ["n"], ["n"]]
    rule = letter_rule(call, words, [["n", "v"]], linear=[(0,)])
    factors = (
        replace(f, fill=(None, -math.inf, None, None))
        if f.lowering
        else replace(f, fill=_ignored(f, 2, call.args[4]))
        for f in with_lowering(rule, "v", "vp").factors
    )
    return replace(rule, factors=tuple(factors))


def reduction_position(call: Call) -> int:
    """Where the reduction is among the arguments of an elementwise loss or its backward."""
    schema = call.target._schema  # type: ignore[attr-defined]
    return next(i for i, a in enumerate(schema.arguments) if a.name == "reduction")


def _elementwise(call: Call) -> Rule:
    """Losses (x, y, .., reduction) -> loss and their backwards (grad, x, y, .., reduction) -> dx.

    All tensors have one shape, but an incoming gradient of a reduced loss; else all is replicated.
    A mean is the composite "mean_loss".
    """
    reduction = call.arg(reduction_position(call), "reduction", REDUCTION_MEAN)
    backward = "backward" in str(call.target)
    tensors = call.operands[1:] if backward else call.operands
    if len({shape_of(dims) for dims in tensors}) != 1:
        return replicate_rule(call)
    letters = [f"d{i}" for i in range(len(tensors[0]))]
    words = [letters for _ in tensors]
    if backward:
        grad = letters if len(call.operands[0]) == len(letters) else []
        rule = letter_rule(call, [grad, *words], [letters], linear=[(0,)])
    elif reduction == REDUCTION_NONE:
        rule = letter_rule(call, words, [letters])
        if call.target is not aten.binary_cross_entropy.default:
            return rule
        # its kernel refuses what is not in [0, 1], in padding too
        fill = (0,) * len(call.operands)
        return replace(rule, factors=tuple(replace(f, fill=fill) for f in rule.factors))
    else:
        zeros = call.target in _ZERO_AT_ZERO
        rule = letter_rule(call, words, [[]], reduction=set(letters), zeros_add_nothing=zeros)
    if reduction != REDUCTION_MEAN:
        return rule
    return replace(
        rule,
        factors=tuple(replace(f, lowering="mean_loss") if f.splits else f for f in rule.factors),
    )


_ELEMENTWISE = (
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "soft_margin_loss",
    "binary_cross_entropy",
)
ELEMENTWISE_LOSSES = (
    *(getattr(aten, name).default for name in _ELEMENTWISE),
    *(getattr(aten, f"{name}_backward").default for name in _ELEMENTWISE),
    aten.binary_cross_entropy_with_logits.default,
)
# f(0, 0) = 0; not so where f is a logarithm of 2
_ZERO_AT_ZERO = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
)

RULES: Mapping[object, RuleFn] = {
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss_backward.default: _nll_backward,
    aten.nll_loss2d_forward.default: _nll,
    aten.nll_loss2d_backward.default: _nll_backward,
    own.cross_entropy.default: _cross_entropy,
    own.cross_entropy_backward.default: _cross_entropy_backward,
    **dict.fromkeys(ELEMENTWISE_LOSSES, _elementwise),
}
