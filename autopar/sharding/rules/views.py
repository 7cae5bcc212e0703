"""Views: `view` regroups atoms, permutes relabel dims, `expand` adds broadcast factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule, regroup

aten = torch.ops.aten


def _view(call: Call) -> Rule:
    return regroup(call, call.result().shape)


def _permute(call: Call, order: list[int]) -> Rule:
    letters = [f"d{i}" for i in range(len(order))]
    return letter_rule(
        call, [letters], [[letters[i] for i in order]], linear=[(0,)], zero_integers=False
    )


def _t(call: Call) -> Rule:
    return _permute(call, list(reversed(range(len(call.operands[0])))))


def _transpose(call: Call) -> Rule:
    order = list(range(len(call.operands[0])))
    a, b = call.args[1], call.args[2]
    if order:
        order[a], order[b] = order[b], order[a]
    return _permute(call, order)


def _permute_dims(call: Call) -> Rule:
    rank = len(call.operands[0])
    return _permute(call, [d % rank for d in call.args[1]])


def _expand(call: Call) -> Rule:
    """A dim that was broadcast is a factor of the result alone: each device expands to its
    shard."""
    meta = call.result()
    rank = len(meta.shape)
    letters = [f"d{i}" for i in range(rank)]
    operand = letters[rank - len(call.operands[0]) :]
    atoms = {c: (n,) for c, n in zip(letters, meta.shape, strict=True) if n != 1}
    # a pending sum stays one: every element of the result is one element of the operand
    return letter_rule(call, [operand], [letters], linear=[(0,)], atoms=atoms, zero_integers=False)


RULES: Mapping[object, RuleFn] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.squeeze.default: _view,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute_dims,
    aten.expand.default: _expand,
}
