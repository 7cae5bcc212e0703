"""Logical meshes and submeshes."""

from __future__ import annotations

import pytest

from autopar.errors import MeshError
from autopar.mesh import LogicalMesh, Submesh, logical_meshes, submeshes
from cost_models import Cluster


def test_ranks_are_row_major() -> None:
    mesh = LogicalMesh((2, 4))
    assert mesh.num_devices == 8 and mesh.num_axes == 2 and str(mesh) == "2x4"
    assert mesh.coordinates(6) == (1, 2) and mesh.rank((1, 2)) == 6
    assert all(mesh.rank(mesh.coordinates(r)) == r for r in range(8))


def test_groups_partition_the_ranks() -> None:
    mesh = LogicalMesh((2, 2, 2))
    assert list(LogicalMesh((2, 4)).groups(0)) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    for axis in range(3):
        assert sorted(r for group in mesh.groups(axis) for r in group) == list(range(8))


@pytest.mark.parametrize("sizes", [(), (0,), (2, 2, 2, 2)])
def test_bad_meshes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(MeshError):
        LogicalMesh(sizes)


def test_bad_submesh_and_links() -> None:
    with pytest.raises(MeshError):
        Submesh(0, 4)
    with pytest.raises(MeshError):
        LogicalMesh((2, 2), (True,))


def test_submeshes_of_a_cluster() -> None:
    cluster = Cluster.parse("h100:2x8")
    assert list(map(str, submeshes(cluster))) == ["1x1", "1x2", "1x4", "1x8", "2x8"]


def test_links() -> None:
    cluster = Cluster.parse("h100:2x8")
    mesh = logical_meshes(Submesh(2, 8))[1]
    assert mesh.link(0, cluster) == cluster.inter
    assert mesh.link(1, cluster) == cluster.groups[0].intra


def test_views_of_a_submesh() -> None:
    assert [m.axis_sizes for m in logical_meshes(Submesh(1, 8))] == [(8,), (2, 4)]
    assert [m.axis_sizes for m in logical_meshes(Submesh(1, 8), max_axes=1)] == [(8,)]
    crossing = logical_meshes(Submesh(2, 8))
    assert [(m.axis_sizes, m.crosses_nodes) for m in crossing] == [
        ((16,), (True,)),
        ((2, 8), (True, False)),
    ]
    assert [m.axis_sizes for m in logical_meshes(Submesh(4, 1))] == [(4,)]
    assert [m.axis_sizes for m in logical_meshes(Submesh(1, 1))] == [(1,)]
