"""Experts: what may be shared is the tokens, the experts, the feed-forward width, or both at once.

    t  tokens are sharded, experts whole: weight gradients pending (data parallel)
    e  experts are sharded, tokens whole: each device adds what its own contribute, pending
    f  every expert's feed-forward width is sharded: results pending (tensor parallel)
    x  tokens and experts are sharded by the same axis: rows go to the device that has their expert
       and come back, and nothing is pending. A lowering of its own: EXCHANGE.

Rows are independent, so an axis on x and another one on t may share the tokens between them: data
parallel groups, each of which has all experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from autopar.layout import REPLICATE
from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Factor, Rule, lettered

EXCHANGE = "exchange"


def _experts(call: Call) -> Rule:
    """(x [t h], index [t k], weight [t k], up [e g f h], down [e h f]) -> out [t h]: linear in
    weight, and in down."""
    text = "t ., t ., t ., e . f ., e . f -> t ."
    rule = lettered(call, text, reduction="e f", linear=[(2,), (4,)], zeros_add_nothing=True)
    return _with_exchange(call, rule)


def _experts_backward(call: Call) -> Rule:
    """(dout, x, index, weight, up, down) -> (dx, dweight, dup, ddown): linear in dout."""
    text = "t ., t ., t ., t ., e . f ., e . f -> t ., t ., e . f ., e . f"
    rule = lettered(call, text, reduction="t e f", linear=[(0,)], zeros_add_nothing=True)
    return _with_exchange(call, rule)


def _with_exchange(call: Call, rule: Rule) -> Rule:
    """The rule with the factors x, one per atom of the tokens. Experts are sharded in one run, by
    the first atom, so that a device's are numbered from first_expert on."""
    factors = [f for f in rule.factors if f.name[0] != "e" or f.name == "e"]
    experts = next((f for f in factors if f.name == "e"), None)
    tokens = [f for f in factors if f.name[0] == "t"]
    if experts is not None:
        factors += [_exchange(t, experts) for t in tokens if math.gcd(t.size, experts.size) > 1]
    return replace(rule, factors=tuple(factors))


def _exchange(tokens: Factor, experts: Factor) -> Factor:
    """Each value is sharded as the factor says that gives it an atom: no value has both."""

    def joined(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(a, b, REPLICATE) for a, b in zip(one, other, strict=True))

    return Factor(
        name="x" + tokens.name[1:],
        size=math.gcd(tokens.size, experts.size),
        operands=joined(tokens.operands, experts.operands),
        results=joined(tokens.results, experts.results),
        lowering=EXCHANGE,
        shares=tokens.name,
    )


RULES: Mapping[object, RuleFn] = {
    torch.ops.autopar.experts.default: _experts,
    torch.ops.autopar.experts_backward.default: _experts_backward,
}
