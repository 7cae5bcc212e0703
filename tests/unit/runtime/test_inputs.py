"""Parts of batches and parameters, seeds, and the rows that a rank needs."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import BatchError
from autopar.graph.program import Ref, TensorMeta
from autopar.layout import REPLICATE
from autopar.lowering.program import Port
from autopar.mesh import LogicalMesh
from autopar.runtime.inputs import (
    BatchFeed,
    local_part,
    row_range,
    whole_feed,
)
from autopar.runtime.virtual import shard

MESH = LogicalMesh((2, 2))


def _port(*layout: int) -> Port:
    return Port(Ref("x"), TensorMeta((8, 6), torch.float32), ((8,), (6,)), layout)


@pytest.mark.parametrize("layout", [(0, 0), (0, 1), (1, 0), (REPLICATE, 1), (-1, -1)])
def test_local_part_is_the_shard(layout: tuple[int, int]) -> None:
    whole = torch.arange(48.0).reshape(8, 6)
    dims = ((8,), (6,)) if layout != (1, 0) else ((2, 4), (6,))
    for rank, want in enumerate(shard(whole, dims, layout, MESH)):
        got = local_part(whole, dims, layout, MESH, MESH.coordinates(rank))
        assert torch.equal(got, want)


def test_rows_of_one_dim_are_views() -> None:
    whole = torch.arange(48.0).reshape(8, 6)
    part = local_part(whole, ((8,), (6,)), (0, 0), MESH, (1, 0))
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", [(0, 0), (0, 1), (1, 0), (REPLICATE, 0)])
def test_rows_alone_give_the_same_part(layout: tuple[int, int]) -> None:
    port = _port(*layout)
    batch = torch.arange(96.0).reshape(16, 6)
    whole = BatchFeed({"x": batch}, frozenset({"x"}), 2)
    for rank in range(4):
        coords = MESH.coordinates(rank)
        start, length = row_range(port, MESH, coords)
        rows = tuple(range(start, start + length))
        kept = torch.cat([batch[start : start + length], batch[8 + start : 8 + start + length]])
        some = BatchFeed({"x": kept}, frozenset({"x"}), 2, rows)
        for m in range(2):
            want = whole.part("x", port, MESH, coords, m)
            assert torch.equal(some.part("x", port, MESH, coords, m), want)


def test_a_leaf_without_the_rows_of_the_batch_is_read_whole_by_each_microbatch() -> None:
    rows, table = TensorMeta((8, 6), torch.float32), TensorMeta((5,), torch.float32)
    leaves = {"x": torch.ones(16, 6), "t": torch.arange(5.0)}
    feed = whole_feed(leaves, {"x": rows, "t": table}, 2)
    assert feed.sliced == {"x"}
    port = Port(Ref("t"), table, ((5,),), (-1, -1))
    assert torch.equal(feed.part("t", port, MESH, (0, 0), 1), leaves["t"])


def test_one_microbatch_in_place_of_the_batch_is_refused() -> None:
    meta = TensorMeta((8, 6), torch.float32)
    with pytest.raises(BatchError, match=r"float32\[8, 6\], expected float32\[16, 6\]"):
        whole_feed({"x": torch.ones(8, 6)}, {"x": meta}, 2)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    meta = TensorMeta((8, 6), torch.float32)
    with pytest.raises(BatchError, match=r"float64\[16, 6\], expected float32\[16, 6\]"):
        whole_feed({"x": torch.ones(16, 6).double()}, {"x": meta}, 2)
