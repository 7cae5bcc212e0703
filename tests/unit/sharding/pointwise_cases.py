"""Calls of pointwise operators: arguments from their schema, or by hand where that does not do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import autopar.ops  # noqa: F401
from autopar.sharding.rules.pointwise import LINEAR, NONLINEAR
from tests.unit.sharding.case import F64, Case, bools, ints, positive, x

aten = torch.ops.aten


_INTEGER = ("bitwise", "__and__", "__or__")
_POSITIVE = """
    acos asin atanh log log10 log1p log2 rsqrt sqrt lgamma digamma erfinv logit pow.Tensor_Tensor
    pow.Scalar xlogy.Tensor special_entr logit_backward
"""
_DOMAIN = {
    "acosh": lambda *s, seed=0: positive(*s, seed=seed) + 1,
    "pow.Tensor_Scalar": positive,
    **dict.fromkeys(_POSITIVE.split(), positive),
}
_SCALARS = {"pow.Tensor_Scalar": 2, "threshold": 0.1, "masked_fill.Tensor": 0.0}
_EXTRA: Mapping[str, Mapping[str, Any]] = {
    "clamp": {"min": -0.5, "max": 0.5},
    "clamp.Tensor": {"min": x(4, 8, seed=3), "max": x(4, 8, seed=4)},
    "div.Tensor_mode": {"rounding_mode": "floor"},
    "div.Scalar_mode": {"rounding_mode": "trunc"},
    "logit": {"eps": 1e-6},
    "logit_backward": {"eps": 1e-6},
}


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    found = getattr(aten, packet, None)
    return None if found is None else getattr(found, overload or "default", None)


def from_schema() -> Iterator[Case]:
    for name in (*NONLINEAR.split(), *LINEAR):
        target = _overload(name)
        if target is None or name in _BY_HAND:
            continue
        args = []
        for number, argument in enumerate(target._schema.arguments):
            kind = str(argument.type)
            if kind == "Tensor":
                args.append(_operand(name, number))
            elif kind.startswith("Optional") or argument.kwarg_only or argument.has_default_value():
                break
            elif kind in ("number", "float", "int"):
                args.append(_scalar(name))
            elif kind == "bool":
                args.append(False)
        yield Case(target, tuple(args), _EXTRA.get(name, {}))


def _operand(name: str, number: int) -> Tensor:
    if name.startswith(_INTEGER):
        return ints(8, 4, 8, seed=number)
    if name.startswith("logical"):
        return bools(4, 8, seed=number)
    return _DOMAIN.get(name, x)(4, 8, seed=number)


def _scalar(name: str) -> Any:
    return 1 if name.startswith(_INTEGER) else _SCALARS.get(name, 0.5)


_BY_HAND = {
    "where.self",
    "masked_fill.Tensor",
    "fill.Tensor",
    "threshold",
    "log_sigmoid_backward",
    "elu_backward",
    "empty_like",
    "lift_fresh",
    "clamp",
    "_prelu_kernel_backward",
}


def by_hand() -> Iterator[Case]:
    a, b, row, one = x(4, 8), x(4, 8, seed=1), x(8, seed=2), x(4, 1, seed=3)
    scalar, mask = x(), bools(4, 8)
    yield Case(aten.add.Tensor, (a, b))
    yield Case(aten.add.Tensor, (a, row))
    yield Case(aten.add.Tensor, (one, row), {"alpha": 2})
    yield Case(aten.add.Tensor, (a, scalar))
    yield Case(aten.add.Tensor, (a, a))
    yield Case(aten.add.Tensor, (a, 3.0))
    yield Case(aten.add.Tensor, (a, ints(4, 4, 8)))
    yield Case(aten.sub.Tensor, (a, one))
    yield Case(aten.sub.Tensor, (ints(4, 4, 8), ints(4, 8)))
    yield Case(aten.rsub.Tensor, (a, b))
    yield Case(aten.mul.Tensor, (a, row))
    yield Case(aten.mul.Tensor, (a, a))
    yield Case(aten.mul.Tensor, (a, mask))
    yield Case(aten.mul.Tensor, (a, scalar))
    yield Case(aten.mul.Tensor, (a, 2.0))
    yield Case(aten.div.Tensor, (a, positive(4, 1)))
    yield Case(aten.div.Tensor, (a, 2.0))
    yield Case(aten.div.Tensor, (a, a))
    yield Case(aten.div.Tensor, (ints(4, 4, 8), 2))
    for target in (aten.floor_divide.default, aten.remainder.Tensor, aten.fmod.Tensor):
        yield Case(target, (ints(9, 4, 8), ints(3, 4, 8) + 1))
    floor = {"rounding_mode": "floor"}
    yield Case(aten.div.Tensor_mode, (ints(9, 4, 8), ints(3, 8) + 1), floor)
    yield Case(aten.where.self, (mask, a, b))
    yield Case(aten.where.self, (mask, a, scalar))
    yield Case(aten.where.self, (bools(4, 1), ints(4, 4, 8), ints(4, 8)))
    yield Case(aten.masked_fill.Scalar, (a, mask, 0))
    yield Case(aten.masked_fill.Scalar, (a, mask, 2.5))
    yield Case(aten.masked_fill.Tensor, (a, bools(8), scalar))
    yield Case(aten.fill.Tensor, (a, scalar))
    yield Case(aten._to_copy.default, (a,), {"dtype": F64})
    yield Case(aten._to_copy.default, (a,), {"dtype": torch.int64})
    yield Case(aten._to_copy.default, (mask,), {"dtype": F64})
    yield Case(torch.ops.prims.convert_element_type.default, (mask, F64))
    yield Case(torch.ops.autopar.hub.default, (a,))
    yield Case(aten.threshold.default, (a, 0.1, 0.0))
    yield Case(aten.log_sigmoid_backward.default, (a, b, torch.exp(-b.abs())))
    yield Case(aten.elu_backward.default, (a, 1.0, 1.0, 1.0, False, b))
    yield Case(aten.empty_like.default, (a,))
    yield Case(aten.lift_fresh.default, (a,))
    yield Case(aten.clamp.default, (a, -0.5, 0.5))
    yield Case(aten._prelu_kernel_backward.default, (a, b, x(8, seed=5).expand(4, 8).clone()))
    yield Case(aten.bucketize.Tensor, (a, torch.tensor([-0.5, 0.0, 0.5], dtype=F64)))
    yield Case(aten.copy.default, (x(4, 8, seed=7), row))
    yield Case(aten.addcmul.default, (a, b, b))
    yield Case(aten.lerp.Tensor, (a, b, b))
    yield Case(aten.gelu.default, (a,), {"approximate": "tanh"})
