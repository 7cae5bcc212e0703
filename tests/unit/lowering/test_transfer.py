"""Tiles between stages: each box is filled once, and data arrives whole."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from autopar.errors import InternalError
from autopar.graph.program import Phase, TensorMeta
from autopar.layout import PARTIAL, atom_windows, local_atoms, shape_of
from autopar.lowering.transfer import Transfer, make_tiles
from autopar.mesh import LogicalMesh
from autopar.runtime.routes import cut_tile, join_tiles
from autopar.runtime.virtual import shard, unshard
from autopar.sharding.strategy import layouts

MESHES = [LogicalMesh(shape) for shape in ((1,), (2,), (4,), (2, 2), (3,), (2, 4), (6,))]
DIMS = [((12,), (4, 6)), ((24,),), ((2, 6), (), (4,)), ((4, 3, 2), (8,)), ((5,), (7, 3))]


def random_transfer(seed: int) -> tuple[Transfer, LogicalMesh, LogicalMesh]:
    rng = random.Random(seed)
    dims, source, target = rng.choice(DIMS), rng.choice(MESHES), rng.choice(MESHES)
    there = rng.choice(layouts(dims, source.axis_sizes))
    here = rng.choice(layouts(dims, target.axis_sizes))
    meta = TensorMeta(shape_of(dims), torch.float64)
    tiles = make_tiles(dims, there, source, here, target)
    return Transfer("v", "v", 0, 1, Phase.FORWARD, meta, dims, there, here, tiles), source, target


@pytest.mark.parametrize("seed", range(90))
def test_tiles_cover_every_shard_once_and_carry_the_data(seed: int) -> None:
    transfer, source, target = random_transfer(seed)
    lengths = local_atoms(transfer.dims, transfer.target_layout, target.axis_sizes)
    for rank in range(target.num_devices):
        filled = torch.zeros(lengths, dtype=torch.int64)
        for tile in transfer.tiles:
            if tile.target == rank:
                window = tuple(slice(start, start + n) for start, n in tile.target_window)
                filled[window] += 1
        coords = target.coordinates(rank)
        windows = atom_windows(transfer.dims, transfer.target_layout, target.axis_sizes, coords)
        inside = filled[tuple(slice(rows) for _, rows in windows)]
        assert (inside == 1).all() and filled.sum() == inside.numel()  # nobody sends padding
    whole = torch.rand(transfer.meta.shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shards = shard(whole, transfer.dims, transfer.source_layout, source, generator)
    tiles = [cut_tile(shards[t.source], transfer, source, t) for t in transfer.tiles]
    pairs = list(zip(transfer.tiles, tiles, strict=True))
    arrived = [
        join_tiles(transfer, target, [p for p in pairs if p[0].target == rank], torch.device("cpu"))
        for rank in range(target.num_devices)
    ]
    assert torch.equal(unshard(arrived, transfer.dims, transfer.target_layout, target), whole)


def test_replicas_take_turns() -> None:
    mesh = LogicalMesh((4,))
    tiles = make_tiles(((8,),), (-1,), mesh, (-1,), mesh)
    assert [(t.source, t.target) for t in tiles] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_equal_shards_need_one_tile_a_rank() -> None:
    mesh = LogicalMesh((2, 2))
    for layout in layouts(((8,), (4,)), (2, 2)):
        tiles = make_tiles(((8,), (4,)), layout, mesh, layout, mesh)
        assert [t.target for t in tiles] == [0, 1, 2, 3]


@pytest.mark.parametrize("ends", list(itertools.permutations((PARTIAL, -1))))
def test_a_pending_sum_cannot_travel(ends: tuple[int, int]) -> None:
    mesh = LogicalMesh((2,))
    with pytest.raises(InternalError, match="pending sum"):
        make_tiles(((4,),), ends[:1], mesh, ends[1:], mesh)
