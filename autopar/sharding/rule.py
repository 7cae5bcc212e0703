"""Sharding rules: the factors of an operator, as data, and the small algebra that derives them.

A **factor** is an index of the operator's iteration space. It says which atom of each operand and
of each result carries the index; an axis of the mesh that is given to the factor shards these
atoms. An operand that the factor does not name must be replicated on that axis. Results follow:

    parallel    the index appears in the result                       result atom
    reduction   summed over                                           PARTIAL
    linear      no index: linear in the operands that are PARTIAL     PARTIAL
    composite   needs a lowering of its own, named by `lowering`

A **rule** is the factors of one call plus the atoms of its results. It is a pure function of the
call's signature. Atoms are compared by their strides within a dim: two splits of one dim agree
where they share strides, and the common refinement exists where the strides form a divisibility
chain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from autopar.errors import InternalError
from autopar.graph.program import TensorMeta
from autopar.layout import PARTIAL, REPLICATE, Atoms, Dims, flat_atoms, raw_dims, shape_of


class Slot(NamedTuple):
    """Stands for operand number `index` in the argument tree of a Call."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs


@dataclass(frozen=True, slots=True)
class Call:
    """The signature of an operator call: all that a rule may look at.

    operands: dims of each tensor argument in order, a value passed twice counting twice.
    same:     for each operand the first operand that is the same value.
    exact:    depends on no parameter and no float input, so that rounding or a pending sum could
              change an integer or a mask derived from it: takes no Partial.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    operands: tuple[Dims, ...]
    dtypes: tuple[torch.dtype, ...]
    results: tuple[TensorMeta | None, ...]
    same: tuple[int, ...]
    exact: bool = False

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """Argument by position or keyword, as the schema orders them."""
        if position < len(self.args):
            return self.args[position]
        return dict(self.kwargs).get(name, default)

    def shape(self, operand: int) -> tuple[int, ...]:
        return shape_of(self.operands[operand])

    def result(self, index: int = 0) -> TensorMeta:
        meta = self.results[index]
        if meta is None:
            raise InternalError(f"result {index} of {self.target} does not exist")
        return meta


@dataclass(frozen=True, slots=True)
class Factor:
    """One way for one mesh axis to share the work of a call.

    size:      the number of shards divides it, or see `fill`; 0 = any number (linear factors).
    operands:  per operand an atom number, REPLICATE or PARTIAL; results likewise.
    splits:    the work is divided by the axis; False where every device does all of it.
    lowering:  name of the composite lowering, "" where local calls suffice.
    shares:    name of another factor with whose axes it may divide an atom, "" for none.
    fill:      per operand what its padding must hold before the call, None for anything; None in
               its place: shards must be even.
    """

    name: str
    size: int
    operands: tuple[int, ...]
    results: tuple[int, ...]
    splits: bool = True
    lowering: str = ""
    shares: str = ""
    fill: tuple[float | None, ...] | None = None


class Origin(StrEnum):
    """Where a rule comes from."""

    WRITTEN = "written"  # a row of `sharding.rules`
    REGISTERED = "registered"  # by `autopar.register_rule`
    DISCOVERED = "discovered"  # found by running the operator
    REPLICATED = "replicated"  # nobody wrote one and none was found


@dataclass(frozen=True, slots=True)
class Rule:
    """dims of each result (None where the result does not exist), and the factors.

    note: the text of a rule that is not written, or why there is none.
    """

    results: tuple[Dims | None, ...]
    factors: tuple[Factor, ...]
    origin: Origin = Origin.WRITTEN
    note: str = ""


class Piece(NamedTuple):
    """A refined atom of one letter: its size, and for each list the atom it is the first part
    of."""

    size: int
    limit: int  # gcd with the atoms it begins
    atoms: tuple[int | None, ...]  # per list: number of the atom that starts where the piece starts


def strides_of(atoms: Atoms) -> tuple[int, ...]:
    """Elements spanned by one step of each atom, major first; the total comes first."""
    strides = [math.prod(atoms)]
    for atom in atoms:
        strides.append(strides[-1] // atom)
    return tuple(strides)


def refine(lists: Sequence[Atoms]) -> tuple[Piece, ...]:
    """Common refinement of several splits of one dim, the first list's strides being kept for sure.

    A stride of another list is taken where it keeps the chain of divisibility. An atom and a piece
    correspond where both start at the same stride: n shards of one are n shards of the other as
    long as n divides both, because both are contiguous runs of the same elements. O(atoms^2), tiny.
    """
    chain = sorted(set(strides_of(lists[0])), reverse=True)
    for atoms in lists[1:]:
        for stride in strides_of(atoms):
            if stride in chain:
                continue
            above = min(s for s in chain if s > stride)
            below = max(s for s in chain if s < stride)
            if above % stride == 0 and stride % below == 0:
                chain = sorted({*chain, stride}, reverse=True)
    starts = [{s: i for i, s in enumerate(strides_of(atoms)[:-1])} for atoms in lists]
    pieces = []
    for high, low in itertools.pairwise(chain):
        found = tuple(start.get(high) for start in starts)
        sizes = [lists[i][a] for i, a in enumerate(found) if a is not None]
        pieces.append(Piece(high // low, math.gcd(high // low, *sizes), found))
    return tuple(pieces)


def lettered(
    call: Call,
    text: str,
    *,
    reduction: str = "",
    blocked: str = "",
    linear: Sequence[Sequence[int]] = (),
    atoms: Mapping[str, Atoms] | None = None,
    zeros_add_nothing: bool = False,
) -> Rule:
    """The rule of an einsum-like text, such as "b i k, b k j -> b i j" with reduction="k".

    Each word is the letter of one dim; "." marks a dim without a factor (size 1 or replicated).
    reduction: letters summed over: a result without the letter is PARTIAL, where it is not in
    `blocked`, whose letters make no factor at all. linear: groups of operands that pass PARTIAL on
    together. atoms: splits for letters that only results have (broadcast dims). zeros_add_nothing:
    where all operands that have a letter of `reduction` hold zeros, nothing is added to the sum, so
    that uneven shards are sound.
    """
    left, right = (side.split(",") for side in text.split("->"))
    return letter_rule(
        call,
        [word.split() for word in left],
        [word.split() for word in right],
        reduction=set(reduction.split()),
        blocked=set(blocked.split()),
        linear=linear,
        atoms=atoms or {},
        zeros_add_nothing=zeros_add_nothing,
    )


def letter_rule(
    call: Call,
    operands: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    *,
    reduction: set[str] = frozenset(),  # type: ignore[assignment]
    blocked: set[str] = frozenset(),  # type: ignore[assignment]
    linear: Sequence[Sequence[int]] = (),
    atoms: Mapping[str, Atoms] | None = None,
    zeros_add_nothing: bool = False,
    zero_integers: bool = True,
) -> Rule:
    """`lettered` on parsed words: one list of letters per operand and result.

    zero_integers: the padding of integers, which may be indices, is zeroed before the call.
    """
    pieces: dict[str, tuple[Piece, ...]] = {}
    sites: dict[str, list[tuple[int, int]]] = {}  # letter -> [(operand, dim)]
    for number, letters in enumerate(operands):
        if len(letters) != len(call.operands[number]):
            raise InternalError(f"{call.target}: {letters} for dims {call.operands[number]}")
        for dim, letter in enumerate(letters):
            if letter != "." and call.operands[number][dim]:
                sites.setdefault(letter, []).append((number, dim))
    for letter, where in sites.items():
        splits = [call.operands[n][d] for n, d in where]
        if len({math.prod(split) for split in splits}) == 1:
            pieces[letter] = refine(splits)
        elif letter not in blocked:
            raise InternalError(f"{call.target}: dim {letter} has the sizes {splits}")
    for letter, sizes in (atoms or {}).items():
        if letter not in pieces:
            pieces[letter] = tuple(Piece(size, size, ()) for size in sizes)

    result_dims = tuple(
        None if meta is None else _result_dims(meta, letters, pieces)
        for meta, letters in zip(call.results, results, strict=True)
    )
    factors: list[Factor] = []
    for letter, split in pieces.items():
        if letter in blocked:
            continue
        for part, piece in enumerate(split):
            factor = _piece_factor(
                call, letter, part, piece, sites.get(letter, []), results, result_dims, reduction
            )
            if factor is not None and (zeros_add_nothing or PARTIAL not in factor.results):
                factor = replace(factor, fill=_fill(call, factor, zero_integers=zero_integers))
            if factor is not None:
                factors.append(factor)
    factors += linear_factors(call, linear)
    return Rule(result_dims, tuple(factors))


def _fill(call: Call, factor: Factor, *, zero_integers: bool) -> tuple[float | None, ...]:
    """Zeros in all that is summed over; else rows keep to themselves, but an index is read."""
    summed = PARTIAL in factor.results
    return tuple(
        0 if atom >= 0 and (summed or (zero_integers and is_index(dtype))) else None
        for atom, dtype in zip(factor.operands, call.dtypes, strict=True)
    )


def is_index(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _result_dims(
    meta: TensorMeta, letters: Sequence[str], pieces: Mapping[str, tuple[Piece, ...]]
) -> Dims:
    dims = []
    for size, letter in zip(meta.shape, letters, strict=True):
        split = tuple(p.size for p in pieces.get(letter, ()))
        if math.prod(split) != size:
            split = (size,) if size != 1 else ()
        dims.append(split)
    return tuple(dims)


def _piece_factor(
    call: Call,
    letter: str,
    part: int,
    piece: Piece,
    sites: Sequence[tuple[int, int]],
    results: Sequence[Sequence[str]],
    result_dims: Sequence[Dims | None],
    reduction: set[str],
) -> Factor | None:
    if None in piece.atoms or piece.limit == 1:
        return None
    operands = [REPLICATE] * len(call.operands)
    for (number, dim), atom in zip(sites, piece.atoms, strict=True):
        if operands[number] != REPLICATE:
            return None  # one operand has the letter twice (a diagonal): no factor
        operands[number] = sum(map(len, call.operands[number][:dim])) + (atom or 0)
    placements: list[int] = []
    named = False
    for dims, letters in zip(result_dims, results, strict=True):
        if dims is None:
            placements.append(REPLICATE)
        elif letter in letters:
            dim = list(letters).index(letter)
            if math.prod(dims[dim]) == 1:
                return None
            placements.append(sum(map(len, dims[:dim])) + part)
            named = True
        elif letter in reduction:
            placements.append(PARTIAL)
            named = True
        else:
            return None  # the result needs the whole dim
    if not named or (call.exact and PARTIAL in placements) or _partial_forbidden(call, placements):
        return None
    name = letter if part == 0 else f"{letter}{part}"
    return Factor(name, piece.limit, tuple(operands), tuple(placements))


def _partial_forbidden(call: Call, placements: Sequence[int]) -> bool:
    """No sum is ever pending on booleans or integers."""
    return any(
        p == PARTIAL and meta is not None and not meta.dtype.is_floating_point
        for p, meta in zip(placements, call.results, strict=True)
    )


def linear_factors(call: Call, groups: Sequence[Sequence[int]]) -> list[Factor]:
    """One factor per group of operands in which the call is jointly linear. Not where another
    operand is the same value (x * x is a square), nor where integers or an exact call are
    involved."""
    if call.exact or any(m is not None and not m.dtype.is_floating_point for m in call.results):
        return []
    factors = []
    for group in groups:
        values = {call.same[i] for i in group}
        if any(call.same[i] in values for i in range(len(call.operands)) if i not in group):
            continue
        if any(not call.dtypes[i].is_floating_point for i in group):
            continue
        operands = tuple(PARTIAL if i in group else REPLICATE for i in range(len(call.operands)))
        results = tuple(PARTIAL if m is not None else REPLICATE for m in call.results)
        name = "+" + "".join(map(str, group))
        factors.append(Factor(name, 0, operands, results, splits=False))
    return factors


def replicate_rule(call: Call) -> Rule:
    """No factor: every device does all the work."""
    return Rule(tuple(None if m is None else raw_dims(m.shape) for m in call.results), ())


def regroup(call: Call, shape: Sequence[int], linear: bool = True) -> Rule:
    """The rule of `view`: the operand's atoms regrouped to `shape`.

    Splits that the new shape forces are kept, others where they chain; the first part of a split
    atom stays shardable. 0-dim and empty tensors have no atoms.
    """
    target = tuple(size for size in shape if size != 1)
    source = flat_atoms(call.operands[0])
    if math.prod(target) == 0:
        return replicate_rule(call)
    pieces = refine([target, source])
    dims: list[Atoms] = []
    remaining = iter(pieces)
    for size in shape:
        split: list[int] = []
        while math.prod(split) < size:
            split.append(next(remaining).size)
        dims.append(tuple(split))
    factors = []
    for number, piece in enumerate(pieces):
        atom = piece.atoms[1]
        if atom is not None:
            limit = math.gcd(piece.size, source[atom])
            if limit > 1:
                factors.append(Factor(f"v{number}", limit, (atom,), (number,), fill=(None,)))
    if linear:
        factors += linear_factors(call, [(0,)])
    return Rule((tuple(dims),), tuple(factors))
