"""Normalisations: the normalised dims stay whole, the others are parallel.

Batch norm is the exception: its statistics run over the batch, so a sharded batch is the composite
"bn", which sums statistics over the axis; the model stays the one of a single device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from autopar.layout import PARTIAL, REPLICATE
from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Factor, Rule, letter_rule, lettered
from autopar.sharding.rules.groups import with_groups

aten = torch.ops.aten


def _along(
    call: Call,
    dim: int,
    linear: list[tuple[int, ...]],
    class_lowering: str = "",
    class_fill: tuple[float | None, ...] | None = None,
) -> Rule:
    """Every operand and result alike; `dim` is whole, or the composite `class_lowering`."""
    rank = len(call.operands[0])
    letters = [f"d{i}" for i in range(rank)]
    words = [letters for _ in call.operands]
    whole = {letters[dim % rank]} if rank else set()
    rule = letter_rule(
        call, words, [letters], blocked=set() if class_lowering else whole, linear=linear
    )
    if not class_lowering:
        return rule
    factors = tuple(
        replace(f, lowering=class_lowering, fill=class_fill)
        if f.splits and f.name.startswith(letters[dim % rank])
        else f
        for f in rule.factors
    )
    return replace(rule, factors=factors)


def _softmax(call: Call) -> Rule:
    return _along(call, call.args[1], [])


def _softmax_backward(call: Call) -> Rule:
    return _along(call, call.args[2], [(0,)])


def _log_softmax(call: Call) -> Rule:
    return _along(call, call.args[1], [], "vp", (-math.inf,))


def _log_softmax_backward(call: Call) -> Rule:
    return _along(call, call.args[2], [(0,)], "vp", (0, None))


def _norm_letters(
    call: Call, operand: int, shape: list[int]
) -> tuple[list[str], list[str], list[str]]:
    """(letters of x, of the normalised part, of the statistics)."""
    rank = len(call.operands[operand])
    outer = [f"d{i}" for i in range(rank - len(shape))]
    inner = [f"n{i}" for i in range(len(shape))]
    return outer + inner, inner, outer + ["."] * len(shape)


def _layer_norm(call: Call) -> Rule:
    """(x, shape, weight?, bias?, eps) -> (y, mean, rstd)."""
    full, inner, stats = _norm_letters(call, 0, call.args[1])
    words = [full, *([inner] * (len(call.operands) - 1))]
    return letter_rule(call, words, [full, stats, stats], blocked=set(inner))


def _layer_norm_backward(call: Call) -> Rule:
    """(dy, x, shape, mean, rstd, weight?, bias?, mask) -> (dx, dweight, dbias): linear in dy."""
    full, inner, stats = _norm_letters(call, 0, call.args[2])
    words = [full, full, stats, stats, *([inner] * (len(call.operands) - 4))]
    outer = set(full) - set(inner)
    return letter_rule(
        call,
        words,
        [full, inner, inner],
        blocked=set(inner),
        reduction=outer,
        linear=[(0,)],
        zeros_add_nothing=True,
    )


def _rms_norm(call: Call) -> Rule:
    """(x, shape, weight?, eps) -> (y, rstd)."""
    full, inner, stats = _norm_letters(call, 0, call.args[1])
    words = [full, *([inner] * (len(call.operands) - 1))]
    return letter_rule(call, words, [full, stats], blocked=set(inner))


def _rms_norm_backward(call: Call) -> Rule:
    """(dy, x, shape, rstd, weight?, mask) -> (dx, dweight): linear in dy."""
    full, inner, stats = _norm_letters(call, 0, call.args[2])
    words = [full, full, stats, *([inner] * (len(call.operands) - 3))]
    outer = set(full) - set(inner)
    return letter_rule(
        call,
        words,
        [full, inner],
        blocked=set(inner),
        reduction=outer,
        linear=[(0,)],
        zeros_add_nothing=True,
    )


def _group_norm(call: Call) -> Rule:
    """(x [N, C, ..], weight?, bias?, N, C, HxW, groups, eps) -> (y, mean [N, G], rstd [N, G])."""
    spatial = " ".join(f"s{i}" for i in range(len(call.operands[0]) - 2))
    text = ", ".join([f"n c {spatial}", *(["c"] * (len(call.operands) - 1))])
    text += f" -> n c {spatial}, n g, n g"
    blocked = f"c g {spatial}"
    rule = lettered(call, text, blocked=blocked, atoms={"g": _one(call.args[6])})
    return with_groups(call, rule, call.args[6], _channel_dims(call), (1, 1, 1))


def _group_norm_backward(call: Call) -> Rule:
    """(dy, x, mean, rstd, weight?, N, C, HxW, groups, mask) -> (dx, dweight, dbias): linear in
    dy."""
    spatial = " ".join(f"s{i}" for i in range(len(call.operands[0]) - 2))
    text = f"n c {spatial}, n c {spatial}, n g, n g"
    text += ", c" if len(call.operands) == 5 else ""
    text += f" -> n c {spatial}, c, c"
    blocked = f"c g {spatial}"
    rule = lettered(
        call, text, blocked=blocked, reduction="n", linear=[(0,)], zeros_add_nothing=True
    )
    return with_groups(call, rule, call.args[8], _channel_dims(call), (1, 0, 0))


def _one(size: int) -> tuple[int, ...]:
    return (size,) if size != 1 else ()


def _channel_dims(call: Call) -> list[int]:
    """Channels or groups are dim 1 of matrices and images, dim 0 of vectors."""
    return [1 if len(dims) > 1 else 0 for dims in call.operands]


def _batch_norm(call: Call) -> Rule:
    """(x, weight?, bias?, running_mean, running_var, training, momentum, eps)
    -> (y, mean, invstd, new running mean, new running var)."""
    spatial = " ".join(f"s{i}" for i in range(len(call.operands[0]) - 2))
    text = ", ".join([f"n c {spatial}", *(["c"] * (len(call.operands) - 1))])
    stats = "c, c, c, c" if call.result(1).shape != (0,) else "., ., c, c"
    text += f" -> n c {spatial}, {stats}"
    rule = lettered(call, text, blocked=f"n {spatial}")
    if not call.operands[0][0]:
        return rule
    atom = call.operands[0][0][0]
    operands = (0, *([REPLICATE] * (len(call.operands) - 1)))
    results = (0, *([REPLICATE] * (len(call.results) - 1)))
    lowering = "bn" if call.args[5] else ""  # in eval mode statistics are given
    fill = (0 if lowering else None, *([None] * (len(call.operands) - 1)))
    factor = Factor("n", atom, operands, results, lowering=lowering, fill=fill)
    return replace(rule, factors=(*rule.factors, factor))


def _batch_norm_backward(call: Call) -> Rule:
    """(dy, x, weight?, running_mean?, running_var?, mean, invstd, training, eps, mask)
    -> (dx, dweight, dbias)."""
    spatial = " ".join(f"s{i}" for i in range(len(call.operands[0]) - 2))
    image = f"n c {spatial}"
    text = ", ".join([image, image, *(["c"] * (len(call.operands) - 2))]) + f" -> {image}, c, c"
    rule = lettered(call, text, blocked=f"n {spatial}", linear=[(0,)])
    if not call.operands[0][0]:
        return rule
    atom = math.gcd(call.operands[0][0][0], call.operands[1][0][0])
    operands = (0, 0, *([REPLICATE] * (len(call.operands) - 2)))
    results = (0, *(PARTIAL if m is not None else REPLICATE for m in call.results[1:]))
    lowering = "bn" if call.args[7] else ""
    fill = (0, 0, *([None] * (len(call.operands) - 2)))
    factor = Factor("n", atom, operands, results, lowering=lowering, fill=fill)
    return replace(rule, factors=(*rule.factors, factor))


RULES: Mapping[object, RuleFn] = {
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}
