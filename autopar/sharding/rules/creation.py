"""Creation and random numbers: any dim shards at no cost; positions come from the global index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule, replicate_rule

aten = torch.ops.aten


def _create(call: Call) -> Rule:
    """Operands, where there are any (new_zeros), give dtype and device only."""
    letters = [f"d{i}" for i in range(len(call.result().shape))]
    atoms = {c: (n,) for c, n in zip(letters, call.result().shape, strict=True) if n != 1}
    words = [["."] * len(d) for d in call.operands]
    return letter_rule(call, words, [letters], atoms=atoms)


def _arange(call: Call) -> Rule:
    """Positions are start + index * step, exact for integers only."""
    if not all(isinstance(a, int) for a in call.args):
        return replicate_rule(call)
    rule = _create(call)
    return replace(rule, factors=tuple(replace(f, lowering="arange") for f in rule.factors))


def _dropout(call: Call) -> Rule:
    """(x, seed [1], ..): the mask of an element depends on its global index only; linear in x."""
    letters = [f"d{i}" for i in range(len(call.operands[0]))]
    return letter_rule(call, [letters, ["."]], [letters], linear=[(0,)])


RULES: Mapping[object, RuleFn] = {
    aten.full.default: _create,
    aten.zeros.default: _create,
    aten.ones.default: _create,
    aten.empty.memory_format: _create,
    aten.new_zeros.default: _create,
    aten.new_ones.default: _create,
    aten.new_full.default: _create,
    aten.new_empty.default: _create,
    aten.scalar_tensor.default: _create,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    torch.ops.autopar.dropout.default: _dropout,
    torch.ops.autopar.uniform.default: _create,
    torch.ops.autopar.normal.default: _create,
    torch.ops.autopar.randint.default: _create,
}
