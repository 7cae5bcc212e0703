"""Pointwise operators with broadcasting: one parallel factor per result atom.

A row names the operands in which the call is linear; these may carry a pending sum. Only operators
listed here are pointwise: an unknown operator is replicated, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, is_index, letter_rule

aten = torch.ops.aten

Groups = Sequence[Sequence[int]]


def broadcast_letters(call: Call) -> tuple[list[list[str]], list[list[str]]]:
    """Letters of operands and results, aligned at the right; a broadcast dim of size 1 gets
    none."""
    rank = max(len(m.shape) for m in call.results if m is not None)
    operands = [[f"d{rank - len(dims) + i}" for i in range(len(dims))] for dims in call.operands]
    results = [
        [f"d{rank - len(m.shape) + i}" for i in range(len(m.shape))] if m is not None else []
        for m in call.results
    ]
    return operands, results


def pointwise(call: Call, linear: Groups = ()) -> Rule:
    operands, results = broadcast_letters(call)
    atoms = {}
    for letters, meta in zip(results, call.results, strict=True):
        if meta is not None:
            atoms.update({c: (n,) for c, n in zip(letters, meta.shape, strict=True) if n != 1})
    return letter_rule(call, operands, results, linear=linear, atoms=atoms, zero_integers=False)


def _rule(linear: Groups) -> RuleFn:
    def rule(call: Call) -> Rule:
        groups = [g for g in linear if max(g) < len(call.operands)]
        return pointwise(call, groups)

    return rule


def _sum_like(call: Call) -> Rule:
    """add, sub: linear in both tensors together; adding a scalar is not linear."""
    return pointwise(call, [(0, 1)] if len(call.operands) == 2 else [])


def _product(call: Call) -> Rule:
    """mul: linear in each factor alone."""
    return pointwise(call, [(0,), (1,)] if len(call.operands) == 2 else [(0,)])


def _masked_fill(call: Call) -> Rule:
    """Linear only where zeros are filled in."""
    zero = len(call.operands) == 2 and call.args[2] == 0
    return pointwise(call, [(0,)] if zero else [])


def _cast(call: Call) -> Rule:
    """A cast between float types passes a pending sum on."""
    return pointwise(call, [(0,)] if call.dtypes[0].is_floating_point else [])


def _division(call: Call) -> Rule:
    """Integers are not divided by what padding holds: zero would be an error."""
    rule = pointwise(call)
    if not all(is_index(dtype) for dtype in call.dtypes):
        return rule
    factors = (
        replace(f, fill=(None, *(1 if atom >= 0 else None for atom in f.operands[1:])))
        for f in rule.factors
    )
    return replace(rule, factors=tuple(factors))


def _bucketize(call: Call) -> Rule:
    """(x, boundaries [n]): the boundaries whole."""
    letters = [f"d{i}" for i in range(len(call.operands[0]))]
    return letter_rule(call, [letters, *([["."]] * (len(call.operands) - 1))], [letters])


NONLINEAR = """
    abs acos acosh add.Scalar asin asinh atan atan2 atanh bitwise_and.Tensor bitwise_and.Scalar
    bitwise_not bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor bitwise_xor.Scalar ceil
    clamp clamp.Tensor clamp_max clamp_min cos cosh div.Tensor_mode div.Scalar_mode elu
    eq.Scalar eq.Tensor erf erfc exp exp2 expm1 floor floor_divide fmod.Scalar fmod.Tensor
    ge.Scalar ge.Tensor gelu gt.Scalar gt.Tensor hardsigmoid hardswish hardtanh isfinite isinf
    isnan le.Scalar le.Tensor leaky_relu log log10 log1p log2 log_sigmoid_forward logical_and
    logical_not logical_or logical_xor lt.Scalar lt.Tensor maximum minimum mish ne.Scalar
    ne.Tensor pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal relu remainder.Scalar
    remainder.Tensor round rsqrt rsub.Scalar sigmoid sign sgn silu sin sinh softplus sqrt square
    sub.Scalar tan tanh trunc zeros_like ones_like full_like empty_like fill.Scalar relu6 selu
    celu masked_fill.Tensor __and__.Tensor __or__.Tensor signbit nan_to_num copysign.Tensor
    erfinv lgamma digamma frac hypot logaddexp logaddexp2 logit sinc threshold xlogy.Tensor fmax
    fmin isposinf isneginf clamp_min.Tensor clamp_max.Tensor bitwise_left_shift.Tensor_Scalar
    bitwise_right_shift.Tensor_Scalar special_entr special_log_ndtr special_erfcx _prelu_kernel
"""

# operator -> groups of operands that pass a pending sum on together
LINEAR: Mapping[str, Groups] = {
    "neg": [(0,)],
    "mul.Scalar": [(0,)],
    "div.Scalar": [(0,)],
    "div.Tensor": [(0,)],
    "clone": [(0,)],
    "copy": [(1,)],
    "where.self": [(1, 2)],
    "tanh_backward": [(0,)],
    "sigmoid_backward": [(0,)],
    "silu_backward": [(0,)],
    "gelu_backward": [(0,)],
    "threshold_backward": [(0,)],
    "hardtanh_backward": [(0,)],
    "hardswish_backward": [(0,)],
    "leaky_relu_backward": [(0,)],
    "elu_backward": [(0,)],
    "softplus_backward": [(0,)],
    "mish_backward": [(0,)],
    "log_sigmoid_backward": [(0,)],
    "hardsigmoid_backward": [(0,)],
    "logit_backward": [(0,)],
    "_prelu_kernel_backward": [(0,)],
    "fill.Tensor": [(1,)],
    "addcmul": [(0, 1), (0, 2)],
    "addcdiv": [(0, 1)],
    "lerp.Scalar": [(0, 1)],
    "lerp.Tensor": [(0, 1)],
}


def _overload(name: str) -> object | None:
    """The overload, or None where this version of torch lacks it."""
    packet_name, _, overload = name.partition(".")
    packet = getattr(aten, packet_name, None)
    return None if packet is None else getattr(packet, overload or "default", None)


def _table() -> Mapping[object, RuleFn]:
    table: dict[object, RuleFn] = {}
    for name in NONLINEAR.split():
        table[_overload(name)] = _rule([])
    for name, groups in LINEAR.items():
        table[_overload(name)] = _rule(groups)
    table |= {
        aten.add.Tensor: _sum_like,
        aten.sub.Tensor: _sum_like,
        aten.rsub.Tensor: _sum_like,
        aten.bucketize.Tensor: _bucketize,
        aten.floor_divide.default: _division,
        aten.remainder.Tensor: _division,
        aten.fmod.Tensor: _division,
        aten.div.Tensor_mode: _division,
        aten.mul.Tensor: _product,
        aten.masked_fill.Scalar: _masked_fill,
        aten._to_copy.default: _cast,
        torch.ops.prims.convert_element_type.default: _cast,
        torch.ops.autopar.hub.default: _rule([(0,)]),
    }
    table.pop(None, None)
    return table


RULES: Mapping[object, RuleFn] = _table()
