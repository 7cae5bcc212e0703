"""Slices, concatenations, pads, scans: the dims that the call touches stay whole, others are
parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule, replicate_rule

aten = torch.ops.aten

Linear = Sequence[Sequence[int]]


def along(call: Call, touched: set[int], linear: Linear = ()) -> Rule:
    """Operands and results of one rank; `touched` dims make no factor."""
    rank = max(
        [len(d) for d in call.operands] + [len(m.shape) for m in call.results if m is not None]
    )
    letters = [f"d{i}" for i in range(rank)]
    blocked = {letters[d % rank] for d in touched} if rank else set()
    words = [letters if len(d) == rank else ["."] * len(d) for d in call.operands]
    results = [letters if m is not None else [] for m in call.results]
    whole = {d % rank for d in touched} if rank else set()
    result_words = [[("." if i in whole else c) for i, c in enumerate(word)] for word in results]
    return letter_rule(call, words, result_words, blocked=blocked, linear=linear)


def _by_dim(position: int, default: int, linear: Linear = ()) -> RuleFn:
    def rule(call: Call) -> Rule:
        return along(call, {call.arg(position, "dim", default)}, linear)

    return rule


def _slice(call: Call) -> Rule:
    """A slice that covers its dim touches nothing."""
    dim = call.arg(1, "dim", 0)
    same = call.result().shape == call.shape(0)
    return along(call, set() if same else {dim}, [(0,)])


def _select(call: Call) -> Rule:
    """(x, dim, index)."""
    rank = len(call.operands[0])
    dim = call.args[1] % rank
    letters = [f"d{i}" for i in range(rank)]
    rest = [c for i, c in enumerate(letters) if i != dim]
    return letter_rule(call, [letters], [rest], blocked={letters[dim]}, linear=[(0,)])


def _select_backward(call: Call) -> Rule:
    """(grad, input_sizes, dim, index)."""
    rank = len(call.args[1])
    dim = call.args[2] % rank
    letters = [f"d{i}" for i in range(rank)]
    rest = [c for i, c in enumerate(letters) if i != dim]
    result = [c if i != dim else "." for i, c in enumerate(letters)]
    return letter_rule(call, [rest], [result], linear=[(0,)])


def _cat(call: Call) -> Rule:
    """Linear in all operands together. Legacy empty operands are not handled: replicated."""
    dim = call.arg(1, "dim", 0)
    return along(call, {dim}, [tuple(range(len(call.operands)))])


def _stack(call: Call) -> Rule:
    rank = len(call.operands[0])
    dim = call.arg(1, "dim", 0) % (rank + 1)
    letters = [f"d{i}" for i in range(rank)]
    result = [*letters[:dim], ".", *letters[dim:]]
    group = tuple(range(len(call.operands)))
    return letter_rule(call, [letters] * len(call.operands), [result], linear=[group])


def _unbind(call: Call) -> Rule:
    rank = len(call.operands[0])
    dim = call.arg(1, "dim", 0) % rank
    letters = [f"d{i}" for i in range(rank)]
    rest = [c for i, c in enumerate(letters) if i != dim]
    results = [rest for _ in call.results]
    return letter_rule(call, [letters], results, blocked={letters[dim]}, linear=[(0,)])


def _pad(call: Call) -> Rule:
    pad = call.args[1]
    rank = len(call.operands[0])
    touched = {rank - 1 - i // 2 for i, amount in enumerate(pad) if amount != 0}
    return along(call, touched, [(0,)] if call.arg(2, "value", 0) == 0 else [])


def _repeat(call: Call) -> Rule:
    """Dims that are repeated once are parallel; the rank may grow on the left."""
    repeats = call.args[1]
    new = len(repeats) - len(call.operands[0])
    letters = [f"d{i}" for i in range(len(repeats))]
    result = [
        c if n == 1 and i >= new else "."
        for i, (c, n) in enumerate(zip(letters, repeats, strict=True))
    ]
    return letter_rule(call, [letters[new:]], [result], linear=[(0,)])


def _slice_backward(call: Call) -> Rule:
    """(grad, input_sizes, dim, start, end, step)."""
    dim = call.args[2]
    same = tuple(call.args[1]) == call.shape(0)
    return along(call, set() if same else {dim}, [(0,)])


def _dims_arg(position: int, linear: Linear = ()) -> RuleFn:
    """No dims given (a roll of the flattened tensor): all are touched."""

    def rule(call: Call) -> Rule:
        dims = call.arg(position, "dims") or range(len(call.operands[0]))
        return along(call, set(dims), linear)

    return rule


def _unfold(call: Call) -> Rule:
    """(x, dim, size, step) -> [.., windows, .., size]."""
    rank = len(call.operands[0])
    if rank == 0:
        return replicate_rule(call)
    letters = [f"d{i}" for i in range(rank)]
    touched = call.args[1] % rank
    result = ["." if i == touched else c for i, c in enumerate(letters)]
    word = ["." if i == touched else c for i, c in enumerate(letters)]
    return letter_rule(call, [word], [[*result, "."]], linear=[(0,)])


def _unfold_backward(call: Call) -> Rule:
    """(grad [.., windows, .., size], input_sizes, dim, size, step)."""
    rank = len(call.args[1])
    if rank == 0:
        return replicate_rule(call)
    touched = call.args[2] % rank
    word = ["." if i == touched else f"d{i}" for i in range(rank)]
    return letter_rule(call, [[*word, "."]], [word], linear=[(0,)])


def _diagonal_words(rank: int, dim1: int, dim2: int) -> tuple[list[str], list[str]]:
    """(letters of the matrices, letters of their diagonals); the two dims have none."""
    pair = {dim1 % rank, dim2 % rank}
    matrix = ["." if i in pair else f"d{i}" for i in range(rank)]
    return matrix, [*(c for c in matrix if c != "."), "."]


def _diagonal(call: Call) -> Rule:
    """(x, offset, dim1, dim2)."""
    rank = len(call.operands[0])
    matrix, diagonal = _diagonal_words(rank, call.arg(2, "dim1", 0), call.arg(3, "dim2", 1))
    return letter_rule(call, [matrix], [diagonal], linear=[(0,)])


def _diagonal_backward(call: Call) -> Rule:
    """(grad, input_sizes, offset, dim1, dim2)."""
    matrix, diagonal = _diagonal_words(len(call.args[1]), call.args[3], call.args[4])
    return letter_rule(call, [diagonal], [matrix], linear=[(0,)])


def _diag_embed(call: Call) -> Rule:
    """(x, offset, dim1, dim2)."""
    rank = len(call.operands[0]) + 1
    matrix, diagonal = _diagonal_words(rank, call.arg(2, "dim1", -2), call.arg(3, "dim2", -1))
    return letter_rule(call, [diagonal], [matrix], linear=[(0,)])


def _select_scatter(call: Call) -> Rule:
    """(x, src without dim, dim, index)."""
    rank = len(call.operands[0])
    dim = call.args[2] % rank
    word = ["." if i == dim else f"d{i}" for i in range(rank)]
    rest = [c for i, c in enumerate(word) if i != dim]
    return letter_rule(call, [word, rest], [word], linear=[(0, 1)])


def _last_two(call: Call) -> Rule:
    return along(call, {-1, -2}, [(0,)])


def _scatter_like(count_linear: Linear) -> Callable[[Call], Rule]:
    """(self, dim, index, src?): every tensor of one rank, `dim` whole, and so are the dims where
    the index is shorter than self."""

    def rule(call: Call) -> Rule:
        dim = call.args[1]
        shapes = [call.shape(i) for i in range(len(call.operands))]
        shapes.append(call.result().shape)
        rank = len(shapes[0])
        if any(len(s) != rank for s in shapes):
            return along(call, set(range(rank)))
        uneven = {i for i in range(rank) if len({s[i] for s in shapes}) > 1}
        return along(call, {dim % rank if rank else 0, *uneven}, count_linear)

    return rule


RULES: Mapping[object, RuleFn] = {
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_backward,
    aten.slice_scatter.default: _by_dim(2, 0, [(0, 1)]),
    aten.select.int: _select,
    aten.select_backward.default: _select_backward,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _by_dim(2, 0, [(0,)]),
    aten.split_with_sizes.default: _by_dim(2, 0, [(0,)]),
    aten.constant_pad_nd.default: _pad,
    aten.flip.default: _dims_arg(1, [(0,)]),
    aten.roll.default: _dims_arg(2, [(0,)]),
    aten.tril.default: _last_two,
    aten.triu.default: _last_two,
    aten.cumsum.default: _by_dim(1, 0, [(0,)]),
    aten.cumprod.default: _by_dim(1, 0),
    aten.sort.default: _by_dim(1, -1),
    aten.sort.stable: _by_dim(2, -1),
    aten.topk.default: _by_dim(2, -1),
    aten.gather.default: _scatter_like([(0,)]),
    aten.scatter.value: _scatter_like([]),
    aten.scatter.src: _scatter_like([]),
    aten.scatter_add.default: _scatter_like([(0, 2)]),
    aten.select_scatter.default: _select_scatter,
    aten.cummax.default: _by_dim(1, 0),
    aten.cummin.default: _by_dim(1, 0),
    aten.logcumsumexp.default: _by_dim(1, 0),
    aten.argsort.default: _by_dim(1, -1),
    aten.glu.default: _by_dim(1, -1),
    aten.glu_backward.default: _by_dim(2, -1, [(0,)]),
    aten.unfold.default: _unfold,
    aten.unfold_backward.default: _unfold_backward,
    aten.diagonal.default: _diagonal,
    aten.diagonal_backward.default: _diagonal_backward,
    aten.diag_embed.default: _diag_embed,
    aten.repeat.default: _repeat,
}
