"""Embeddings, index selection and scattering by index: looked-up dims whole, or the masked
composite "vocab". Accumulating forms add: shards of the index leave a pending sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from autopar.layout import PARTIAL
from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule, replicate_rule

aten = torch.ops.aten


def with_lowering(rule: Rule, letter: str, lowering: str) -> Rule:
    """The factor of a letter becomes a composite. Only its first atom: a shard is one run of
    rows. Global indices never point into its padding, which may hold anything."""
    factors = []
    for factor in rule.factors:
        if factor.splits and factor.name.startswith(letter):
            if factor.name != letter:
                continue
            anything = (None,) * len(factor.operands)
            factor = replace(factor, lowering=lowering, fill=anything)
        factors.append(factor)
    return replace(rule, factors=tuple(factors))


def _embedding(call: Call) -> Rule:
    """(weight [v, d], indices) -> [.., d]. v sharded: masked lookup of the rows that are here,
    pending."""
    tokens = [f"t{i}" for i in range(len(call.operands[1]))]
    rule = letter_rule(call, [["v", "d"], tokens], [[*tokens, "d"]], reduction={"v"}, linear=[(0,)])
    return with_lowering(rule, "v", "vocab")


def _embedding_backward(call: Call) -> Rule:
    """(grad [.., d], indices, num_weights, padding_idx, scale_grad_by_freq) -> [v, d].

    Tokens sharded: pending; v sharded: each device adds the rows that are here. A scale by
    frequency counts all tokens, so that only d is parallel.
    """
    tokens = [f"t{i}" for i in range(len(call.operands[1]))]
    blocked = {*tokens, "v"} if call.args[4] else set()
    atoms = {"v": (call.result().shape[0],)}
    words = [[*tokens, "d"], tokens]
    rule = letter_rule(
        call,
        words,
        [["v", "d"]],
        reduction=set(tokens),
        blocked=blocked,
        linear=[(0,)],
        atoms=atoms,
        zeros_add_nothing=True,
    )
    return with_lowering(rule, "v", "vocab")


def _index_select(call: Call) -> Rule:
    """(x, dim, index [n])."""
    rank = len(call.operands[0])
    if rank == 0 or len(call.operands[1]) == 0:
        return replicate_rule(call)
    dim = call.args[1] % rank
    letters = [f"d{i}" for i in range(rank)]
    result = [c if i != dim else "n" for i, c in enumerate(letters)]
    return letter_rule(call, [letters, ["n"]], [result], blocked={letters[dim]}, linear=[(0,)])


def _index_add(call: Call) -> Rule:
    """(x, dim, index [n], source): linear in x and source together; n sharded: pending, as is x."""
    rank = len(call.operands[0])
    if rank == 0 or len(call.operands[2]) != rank:
        return replicate_rule(call)
    dim = call.args[1] % rank
    letters = [f"d{i}" for i in range(rank)]
    source = [c if i != dim else "n" for i, c in enumerate(letters)]
    rule = letter_rule(
        call,
        [letters, ["n"], source],
        [letters],
        reduction={"n"},
        blocked={letters[dim]},
        linear=[(0, 2)],
        zeros_add_nothing=True,
    )
    return _adds_to_first(call, rule)


def _adds_to_first(call: Call, rule: Rule) -> Rule:
    """Where shards of the index leave a pending sum, the value that they add to is pending too."""
    factors = []
    for factor in rule.factors:
        if factor.splits and factor.results[0] == PARTIAL:
            if 0 in call.same[1:]:
                continue
            spread = factor.operands[-1] < 0  # one value for all rows: the padding would add it too
            fill = None if spread else factor.fill
            factor = replace(factor, operands=(PARTIAL, *factor.operands[1:]), fill=fill)
        factors.append(factor)
    return replace(rule, factors=tuple(factors))


def _indexed(call: Call) -> tuple[list[str], list[list[str]], list[str], set[str]] | None:
    """(letters of x, of each index, of x[index], indexed letters) for x[.., i, j, ..] with
    neighbouring integer indices, broadcast against each other; None for other forms."""
    indices = list(call.args[1])
    present = [i for i, index in enumerate(indices) if index is not None]
    numbers = [indices[i].index for i in present]
    if not present or any(call.dtypes[n] in (torch.bool, torch.uint8) for n in numbers):
        return None
    if present != list(range(present[0], present[-1] + 1)):
        return None
    shape = torch.broadcast_shapes(*(call.shape(n) for n in numbers))
    letters = [f"d{i}" for i in range(len(call.operands[0]))]
    index = [f"i{i}" for i in range(len(shape))]
    words = [_broadcast(index, shape, call.shape(n)) for n in numbers]
    result = [*letters[: present[0]], *index, *letters[present[-1] + 1 :]]
    return letters, words, result, {letters[i] for i in present}


def _broadcast(letters: Sequence[str], shape: Sequence[int], own: Sequence[int]) -> list[str]:
    """The letters of an operand of shape `own` that broadcasts to `shape`."""
    last = len(shape) - len(own)
    return [c if n == m else "." for c, n, m in zip(letters[last:], shape[last:], own, strict=True)]


def _index(call: Call) -> Rule:
    """x[index]: the indexed dims whole, the index's dims and the remaining ones parallel."""
    form = _indexed(call)
    if form is None:
        return replicate_rule(call)
    letters, indices, result, whole = form
    return letter_rule(call, [letters, *indices], [result], blocked=whole, linear=[(0,)])


def _index_put(call: Call) -> Rule:
    """(x, indices, values, accumulate). Accumulating: linear in x and values together, and the dims
    of the index are summed over. Otherwise the last write wins: the dims of the index stay
    whole."""
    form = _indexed(call)
    if form is None:
        return replicate_rule(call)
    letters, indices, written, whole = form
    accumulate = bool(call.arg(3, "accumulate", False))
    last = len(call.operands) - 1
    values = written[len(written) - len(call.operands[last]) :]
    index = {c for c in written if c not in letters}
    rule = letter_rule(
        call,
        [letters, *indices, values],
        [letters],
        reduction=index,
        blocked=whole | (set() if accumulate else index),
        linear=[(0, last)] if accumulate else [],
        zeros_add_nothing=True,
    )
    return _adds_to_first(call, rule)


RULES: Mapping[object, RuleFn] = {
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_add,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
}
