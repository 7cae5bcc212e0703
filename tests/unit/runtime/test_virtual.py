"""The virtual mesh: collectives on lists of shards, sharding and recombining."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import InternalError, VerificationError
from autopar.layout import PARTIAL, REPLICATE
from autopar.mesh import LogicalMesh
from autopar.runtime.virtual import VirtualCollectives, shard, unshard

MESH = LogicalMesh((2, 2))
DIMS = ((4,), (2,))


def _ranks() -> list[torch.Tensor]:
    return [torch.full((2, 1), float(rank)) for rank in range(4)]


def test_collectives_run_inside_their_groups() -> None:
    run = VirtualCollectives(MESH).run
    assert [t[0].item() for t in run("all_reduce", _ranks(), 0, "sum")] == [2, 4, 2, 4]
    assert [t[0].item() for t in run("all_reduce", _ranks(), 1, "max")] == [1, 1, 3, 3]
    gathered = run("all_gather", _ranks(), 1, "sum")
    assert gathered[2].flatten().tolist() == [2, 2, 3, 3]
    scattered = run("reduce_scatter", _ranks(), 0, "sum")
    assert scattered[1].shape == (1, 1) and scattered[1].item() == 4
    exchanged = run("all_to_all", _ranks(), 0, "sum")
    assert exchanged[0].flatten().tolist() == [0, 2]


def test_an_unknown_collective_is_a_bug() -> None:
    with pytest.raises(InternalError):
        VirtualCollectives(MESH).run("broadcast", _ranks(), 0, "sum")


def test_a_pending_sum_is_split_at_random_and_exactly() -> None:
    whole = torch.randn(4, 2, dtype=torch.float64)
    parts = shard(whole, DIMS, (PARTIAL, REPLICATE), MESH, torch.Generator().manual_seed(0))
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])
    assert parts[2].abs().sum() > 0
    torch.testing.assert_close(parts[0] + parts[2], whole)
    torch.testing.assert_close(unshard(parts, DIMS, (PARTIAL, REPLICATE), MESH), whole)


def test_without_a_generator_the_first_rank_keeps_the_sum() -> None:
    parts = shard(torch.ones(4, 2), DIMS, (PARTIAL, 0), MESH)
    assert [p.sum().item() for p in parts] == [4, 4, 0, 0]


def test_replicas_that_differ_are_seen() -> None:
    shards = shard(torch.ones(4, 2), DIMS, (0, REPLICATE), MESH)
    shards[1] = shards[1] + 1
    with pytest.raises(VerificationError, match="replicas"):
        unshard(shards, DIMS, (0, REPLICATE), MESH)


def test_a_shard_of_another_shape_is_seen() -> None:
    shards = [t.reshape(-1) for t in shard(torch.ones(4, 2), DIMS, (0, 1), MESH)]
    with pytest.raises(VerificationError, match="instead of"):
        unshard(shards, DIMS, (0, 1), MESH)
