"""Contractions: one einsum per operator; a sharded contracted factor leaves a pending sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule, lettered
from autopar.sharding.rules.groups import with_groups

aten = torch.ops.aten


def _products(call: Call, text: str) -> Rule:
    """Products of two operands summed over k."""
    return lettered(call, text, reduction="k", linear=[(0,), (1,)], zeros_add_nothing=True)


def _mm(call: Call) -> Rule:
    return _products(call, "i k, k j -> i j")


def _bmm(call: Call) -> Rule:
    return _products(call, "b i k, b k j -> b i j")


def _addmm(call: Call) -> Rule:
    """(bias, a, b): k stays whole, or the bias would be added once per shard of it."""
    rank = len(call.operands[1])
    out = ["b", "i", "j"][3 - rank :]
    bias = out[rank - len(call.operands[0]) :]
    batch = out[:-2]
    words = [bias, [*batch, "i", "k"], [*batch, "k", "j"]]
    return letter_rule(call, words, [out], blocked={"k"}, linear=[(0, 1), (0, 2)])


def _mv(call: Call) -> Rule:
    return _products(call, "i k, k -> i")


def _dot(call: Call) -> Rule:
    return _products(call, "k, k ->")


def _convolution(call: Call) -> Rule:
    """n c .., o c .. -> n o .. ; with groups, whole groups of channels instead (g). A bias would be
    added once per shard of c, so c is a reduction factor only without one."""
    transposed, groups = call.args[6], call.args[8]
    spatial = [f"s{i}" for i in range(len(call.operands[0]) - 2)]
    kernel = [f"k{i}" for i in range(len(spatial))]
    bias = len(call.operands) == 3
    channels = groups == 1 and not transposed
    weight = "o c" if channels else ". ."
    image = f"n {'c' if channels else '.'} {' '.join(spatial)}"
    text = f"{image}, {weight} {' '.join(kernel)}"
    text += (", o" if channels else ", .") if bias else ""
    out = [f"t{i}" for i in range(len(spatial))]
    text += f" -> n {'o' if channels else '.'} {' '.join(out)}"
    rule = lettered(
        call,
        text,
        reduction="" if bias else "c",
        blocked=" ".join([*spatial, *kernel, *(["c"] if bias else [])]),
        linear=[] if bias else [(0,), (1,)],
        zeros_add_nothing=True,
    )
    return with_groups(call, rule, groups, (1, 0, 0)[: len(call.operands)], (1,), "g")


def _convolution_backward(call: Call) -> Rule:
    """(dy, x, w) -> (dx, dw, db): three contractions in one call.

    n: dx n, dw and db pending; o: dx pending, dw o, db o; c: dx c, dw c (only where no db is made,
    which has no c and would be computed by everyone: it is then replicated). With groups: n, and
    whole groups of channels, which all three results have.
    """
    transposed, groups = call.args[7], call.args[9]
    dims = len(call.operands[0]) - 2
    t, s, k = ([f"{letter}{i}" for i in range(dims)] for letter in "tsk")
    blocked = {*t, *s, *k}
    if transposed or groups != 1:
        text = f"n . {' '.join(t)}, n . {' '.join(s)}, . . {' '.join(k)}"
        text += f" -> n . {' '.join(s)}, . . {' '.join(k)}, ."
        rule = _backward(call, text, "n", blocked)
        return with_groups(call, rule, groups, (1, 1, 0), (1, 0, 0), "g")
    text = f"n o {' '.join(t)}, n c {' '.join(s)}, o c {' '.join(k)}"
    text += f" -> n c {' '.join(s)}, o c {' '.join(k)}, o"
    if call.results[2] is not None:
        blocked.add("c")
    return _backward(call, text, "n o", blocked)


def _backward(call: Call, text: str, reduction: str, blocked: set[str]) -> Rule:
    return lettered(
        call,
        text,
        reduction=reduction,
        blocked=" ".join(blocked),
        linear=[(0,)],
        zeros_add_nothing=True,
    )


RULES: Mapping[object, RuleFn] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
