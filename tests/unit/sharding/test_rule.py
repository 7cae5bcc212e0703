"""The algebra of factors: refinement, letters, regrouping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InternalError
from autopar.graph.program import TensorMeta
from autopar.layout import PARTIAL, REPLICATE, Atoms, Dims, atom_offsets, local_atoms, shape_of
from autopar.sharding.registry import rule_for
from autopar.sharding.rule import Call, Origin, lettered, refine, regroup, strides_of

aten = torch.ops.aten
F64 = torch.float64


def call_of(
    *operands: Dims, results: tuple[tuple[int, ...], ...], same: tuple[int, ...] = ()
) -> Call:
    numbers = tuple(range(len(operands)))
    return Call(
        target=aten.mm.default,
        args=(),
        kwargs=(),
        operands=operands,
        dtypes=(F64,) * len(operands),
        results=tuple(TensorMeta(shape, F64) for shape in results),
        same=same or numbers,
    )


@st.composite
def splits(draw: st.DrawFn, total: int) -> Atoms:
    """A factorisation of `total` in a random order."""
    atoms: list[int] = []
    while total > 1:
        atom = draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        atoms.append(atom)
        total //= atom
    return tuple(atoms)


@st.composite
def several_splits(draw: st.DrawFn) -> list[Atoms]:
    total = draw(st.sampled_from([2, 4, 6, 8, 12, 16, 24, 36, 48]))
    return [draw(splits(total)) for _ in range(draw(st.integers(1, 3)))]


def owned(atoms: Atoms, atom: int, shards: int, coordinate: int) -> set[int]:
    """Elements of a dim that one shard of an atom holds."""
    dims, layout = (atoms,), (atom,)
    start = atom_offsets(dims, layout, (shards,))[atom].at((coordinate,))
    length = local_atoms(dims, layout, (shards,))[atom]
    stride = strides_of(atoms)[atom + 1]
    return {
        e for e in range(math.prod(atoms)) if start <= e // stride % atoms[atom] < start + length
    }


@settings(max_examples=150, deadline=None)
@given(several_splits())
def test_pieces_of_a_refinement_are_the_same_elements_in_every_list(lists: list[Atoms]) -> None:
    pieces = refine(lists)
    sizes = tuple(piece.size for piece in pieces)
    assert math.prod(sizes) == math.prod(lists[0])
    for number, piece in enumerate(pieces):
        for shards in (n for n in range(2, piece.limit + 1) if piece.limit % n == 0):
            for coordinate in range(shards):
                want = owned(sizes, number, shards, coordinate)
                for atoms, atom in zip(lists, piece.atoms, strict=True):
                    assert atom is None or owned(atoms, atom, shards, coordinate) == want


@settings(max_examples=100, deadline=None)
@given(several_splits())
def test_the_first_list_keeps_its_strides(lists: list[Atoms]) -> None:
    sizes = tuple(piece.size for piece in refine(lists))
    assert set(strides_of(lists[0])) <= set(strides_of(sizes))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_view_shards_the_same_elements(data: st.DataObject) -> None:
    total = data.draw(st.sampled_from([4, 8, 12, 16, 24]))
    shape, atoms = data.draw(splits(total)), data.draw(splits(total))
    call = call_of((atoms,), results=(shape,))
    rule = regroup(call, shape)
    (dims,) = rule.results
    assert dims is not None and shape_of(dims) == shape
    flat = tuple(a for dim in dims for a in dim)
    for factor in rule.factors:
        if not factor.splits:
            continue
        for coordinate in range(factor.size):
            before = owned(atoms, factor.operands[0], factor.size, coordinate)
            assert before == owned(flat, factor.results[0], factor.size, coordinate)


def test_letters_become_factors() -> None:
    call = call_of(((4,), (6,)), ((6,), (8,)), results=((4, 8),))
    factors = {f.name: f for f in lettered(call, "i k, k j -> i j", reduction="k").factors}
    assert factors["i"].operands == (0, REPLICATE) and factors["i"].results == (0,)
    assert factors["j"].operands == (REPLICATE, 1) and factors["j"].results == (1,)
    assert factors["k"].operands == (1, 0) and factors["k"].results == (PARTIAL,)
    assert [factors[c].size for c in "ijk"] == [4, 8, 6]


def test_atoms_of_a_merged_dim_are_factors_of_their_own() -> None:
    call = call_of(((4, 2), (6,)), ((6,), (8,)), results=((8, 8),))
    rule = lettered(call, "i k, k j -> i j", reduction="k")
    assert rule.results == (((4, 2), (8,)),)
    assert {f.name: f.size for f in rule.factors} == {"i": 4, "i1": 2, "k": 6, "j": 8}


def test_one_operand_with_a_letter_twice_has_no_factor() -> None:
    call = call_of(((4,), (4,)), results=((4,),))
    assert not lettered(call, "i i -> i").factors


def test_a_broadcast_dim_shards_the_result_alone() -> None:
    call = call_of(((), (8,)), results=((4, 8),))
    rule = lettered(call, "a b -> a b", atoms={"a": (4,)})
    assert {f.name: f.operands for f in rule.factors} == {"b": (0,), "a": (REPLICATE,)}


def test_no_linear_factor_where_a_value_is_passed_twice() -> None:
    call = call_of(((4,),), ((4,),), results=((4,),), same=(0, 0))
    rule = lettered(call, "i, i -> i", linear=[(0,), (1,)])
    assert [f.name for f in rule.factors] == ["i"]


def test_sizes_of_a_letter_must_agree() -> None:
    call = call_of(((4,),), ((6,),), results=((4,),))
    with pytest.raises(InternalError, match="sizes"):
        lettered(call, "i, i -> i")


def test_an_unknown_operator_is_replicated_and_says_so() -> None:
    call = Call(aten.grid_sampler_2d.default, (), (), (((4,),),), (F64,),
                (TensorMeta((4,), F64),), (0,))  # fmt: skip
    rule = rule_for(call)
    assert rule.origin is Origin.REPLICATED and rule.note and not rule.factors


def test_an_empty_tensor_is_replicated() -> None:
    call = Call(aten.relu.default, (), (), (((0,), (4,)),), (F64,),
                (TensorMeta((0, 4), F64),), (0,))  # fmt: skip
    assert not rule_for(call).factors
