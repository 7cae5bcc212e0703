"""Layouts: local shapes, offsets, text form, DTensor placements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from autopar.errors import LayoutError
from autopar.layout import (
    PARTIAL,
    REPLICATE,
    Dims,
    Layout,
    Offset,
    atom_offsets,
    atom_windows,
    can_shard,
    coarsen,
    dim_of_atom,
    first_atom,
    is_plain,
    is_valid,
    layout_text,
    local_atoms,
    local_shape,
    local_share,
    parse_layout,
    raw_dims,
    shape_of,
    to_placements,
    without_partial,
)
from autopar.mesh import LogicalMesh
from autopar.runtime.virtual import shard, unshard
from autopar.sharding.strategy import layouts

DIMS: Dims = ((4, 2), (), (8,))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Dims, Layout, tuple[int, ...]]:
    dims = tuple(
        tuple(draw(st.lists(st.sampled_from([2, 3, 4, 5, 7, 8]), max_size=2))) for _ in range(2)
    )
    mesh = draw(st.sampled_from([(2,), (3,), (4,), (2, 2), (2, 4)]))
    return dims, draw(st.sampled_from(layouts(dims, mesh, partial=True))), mesh


def test_dims_of_a_plain_tensor_have_no_atom_for_size_one() -> None:
    assert raw_dims((4, 1, 8)) == ((4,), (), (8,))
    assert shape_of(DIMS) == (8, 1, 8)
    assert dim_of_atom(DIMS, 1) == (0, 1) and dim_of_atom(DIMS, 2) == (2, 0)
    assert first_atom(DIMS, 2) == 2 and first_atom(DIMS, 1) is None
    with pytest.raises(LayoutError):
        dim_of_atom(DIMS, 3)


def test_local_shape_and_offsets() -> None:
    assert local_atoms(DIMS, (0, 2), (2, 4)) == (2, 2, 2)
    assert local_shape(DIMS, (0, 2), (2, 4)) == (4, 1, 2)
    assert local_share(DIMS, (0, REPLICATE, PARTIAL), (2, 4, 8)) == 1 / 2
    starts = atom_offsets(DIMS, (2, 2), (2, 2))
    assert [o.at((1, 1)) for o in starts] == [0, 0, 6]
    assert Offset((2, 1), 3).at((1, 4)) == 9


def test_an_uneven_atom_has_one_axis_and_little_padding() -> None:
    assert can_shard(5, (2,)) and can_shard(5, (4,)) and can_shard(50257, (8,))
    assert not can_shard(9, (8,))  # two rows each: 7 of 16 would be padding
    assert not can_shard(3, (4,)) and not can_shard(6, (2, 2)) and can_shard(6, (2, 1))
    assert not is_valid(DIMS, (1, 1), (2, 2)) and not is_valid(DIMS, (3,), (2,))
    with pytest.raises(LayoutError, match="choose another"):
        local_atoms(DIMS, (1,), (4,))


def test_uneven_shards_are_those_of_dtensor() -> None:
    """Full chunks first; the last ones are short or empty."""
    dims: Dims = ((5,), (3,))
    assert local_shape(dims, (0,), (4,)) == (2, 3) and local_share(dims, (0,), (4,)) == 2 / 5
    windows = [atom_windows(dims, (0,), (4,), (rank,))[0] for rank in range(4)]
    assert windows == [(0, 2), (2, 2), (4, 1), (5, 0)]
    for rank, (_, rows) in enumerate(windows):
        size, _ = Shard.local_shard_size_and_offset(5, 4, rank)
        assert size == rows


def test_an_uneven_part_of_a_dim_is_not_plain() -> None:
    """A third of 4 x 2 rows is 4 rows as atoms, 3 rows as one dim."""
    assert is_plain(((4, 2),), (0,), (2,)) and not is_plain(((4, 2),), (0,), (3,))
    assert coarsen(((5,),), (0,), (2,)) == (((5,),), (0,))
    with pytest.raises(LayoutError, match="inside a dim"):
        coarsen(((4, 2),), (0,), (3,))


def test_text_reads_as_it_is_written() -> None:
    assert layout_text(DIMS, (0, 1, 2, REPLICATE, PARTIAL)) == "S0 S0.1 S2 R P"
    for wrong in ("X", "S", "S9", "S1", "S0.7", "Sx.1"):
        with pytest.raises(LayoutError):
            parse_layout(wrong, DIMS)


def test_dtensor_placements() -> None:
    assert to_placements(DIMS, (2, REPLICATE, PARTIAL), (2, 2, 2)) == (
        Shard(2),
        Replicate(),
        Partial(),
    )
    with pytest.raises(LayoutError):
        to_placements(DIMS, (1,), (2,))
    assert without_partial((PARTIAL, 0)) == (REPLICATE, 0)


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_properties(tensor: tuple[Dims, Layout, tuple[int, ...]]) -> None:
    dims, layout, mesh = tensor
    assert is_valid(dims, layout, mesh)
    assert parse_layout(layout_text(dims, layout), dims) == layout
    whole = torch.arange(float(torch.Size(shape_of(dims)).numel())).reshape(shape_of(dims))
    shards = shard(whole, dims, layout, LogicalMesh(mesh), torch.Generator().manual_seed(0))
    assert all(s.shape == local_shape(dims, layout, mesh) for s in shards)
    assert shards[0].numel() == round(whole.numel() * local_share(dims, layout, mesh))
    assert torch.equal(unshard(shards, dims, layout, LogicalMesh(mesh)), whole)
