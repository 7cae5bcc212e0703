"""Logical meshes and submeshes."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from autopar.errors import MeshError
from autopar.mesh import LogicalMesh, Submesh, least_devices, logical_meshes, submeshes
from cost_models import Cluster, CollectiveKind


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
    with pytest.raises(MeshError, match="a view of 2x4 has 8 devices"):
        Submesh(2, 4).view((2, 2))


def test_parts_of_an_axis_in_a_node() -> None:
    with pytest.raises(MeshError, match="equal part"):
        LogicalMesh((4,), (True,), (3,))
    assert LogicalMesh((4, 2), (True, False)).ranks_per_node == (1, 2)


def test_submeshes_of_a_cluster() -> None:
    cluster = Cluster.parse("h100:2x8")
    assert list(map(str, submeshes(cluster))) == ["1x1", "1x2", "1x4", "1x8", "2x8"]
    assert list(map(str, submeshes(Cluster.parse("h100:1x6")))) == ["1x1", "1x2", "1x6"]


def test_submeshes_lie_in_one_node_group() -> None:
    cluster = Cluster.parse("h100:1x4+a100:3x2")
    found = [(s.group, str(s)) for s in submeshes(cluster)]
    assert found == [
        *((0, text) for text in ("1x1", "1x2", "1x4")),
        *((1, text) for text in ("1x1", "1x2", "2x2", "3x2")),
    ]
    assert {view.group for s in submeshes(cluster)[3:] for view in logical_meshes(s)} == {1}


@pytest.mark.parametrize("nodes", [9, 12, 13, 31, 96, 97, 100, 128])
def test_every_number_of_stages_packs_the_nodes(nodes: int) -> None:
    """On any number of nodes; and the sizes stay few."""
    found = submeshes(Cluster.parse(f"h100:{nodes}x8"))
    sizes = {s.num_nodes for s in found if s.devices_per_node == 8}
    assert len(sizes) <= 24 and max(sizes) == nodes
    reached = {0}  # by so many stages
    for _ in range(nodes):
        reached = {n + size for n in reached for size in sizes if n + size <= nodes}
        assert nodes in reached


@pytest.mark.parametrize(
    ("cluster", "layers", "least"),
    [
        ("h100:8x8", 126, 1),
        ("h100:32x8", 126, 2),
        ("h100:128x8", 126, 8),
        ("h100:2048x8", 126, 128),
        ("h100:2048x8", 400, 32),
        ("h100:2000x8", 126, 64),
    ],
)
def test_large_clusters_have_a_least_submesh(cluster: str, layers: int, least: int) -> None:
    made = Cluster.parse(cluster)
    assert least_devices(made, layers) == (least,)
    sizes = {s.num_devices for s in submeshes(made, layers)}
    assert min(sizes) == least and max(sizes) == made.num_devices and len(sizes) <= 24
    assert made.num_devices // math.gcd(*sizes) <= 2 * max(128, layers)


def test_states_of_several_groups_stay_few() -> None:
    made = Cluster.parse("h100:32x8+a100:64x8+v100:1x8")
    assert least_devices(Cluster.parse("h100:1x8+a100:2x8"), 126) == (1, 1)
    assert least_devices(Cluster.parse("h100:32x8+a100:64x8"), 126) == (16, 32)
    states = 1
    for group, least in enumerate(least_devices(made, 126)):
        own = [s.num_devices for s in submeshes(made, 126) if s.group == group]
        assert min(own) == least and max(own) == made.groups[group].num_devices
        states *= 1 + max(own) // math.gcd(*own)
    assert states <= 1100


def test_paths() -> None:
    cluster = Cluster.parse("h100:2x8")
    mesh = logical_meshes(Submesh(2, 8))[1]
    assert mesh.path(0, cluster).bottleneck(CollectiveKind.ALL_GATHER) == cluster.inter
    assert mesh.path(1, cluster).bottleneck(CollectiveKind.ALL_GATHER) == cluster.groups[0].intra


@pytest.mark.parametrize(
    "kind", [kind for kind in CollectiveKind if kind is not CollectiveKind.SEND], ids=str
)
def test_the_groups_of_an_axis_share_the_cards_of_a_node(kind: CollectiveKind) -> None:
    """Together they send no more out of a node than its eight cards can."""
    cluster = Cluster.parse("h100:16x8")
    for mesh in logical_meshes(Submesh(16, 8), max_axes=3):
        for axis in range(mesh.num_axes):
            path = mesh.path(axis, cluster)
            if not mesh.crosses_nodes[axis]:
                assert path.num_nodes == 1
                continue
            groups = 8 // path.ranks_per_node  # in each node
            rate = path.bottleneck(kind).achieved_bytes_per_s
            if kind is CollectiveKind.ALL_TO_ALL:  # each rank sends most of its blocks out
                far = (path.num_ranks - path.ranks_per_node) / (path.num_ranks - 1)
                rate *= path.ranks_per_node * far
            assert groups * rate <= 8 * cluster.inter.achieved_bytes_per_s * (1 + 1e-12)


def test_views_of_a_submesh() -> None:
    assert [m.axis_sizes for m in logical_meshes(Submesh(1, 8))] == [(8,), (2, 4)]
    assert [m.axis_sizes for m in logical_meshes(Submesh(1, 8), max_axes=1)] == [(8,)]
    inside = logical_meshes(Submesh(1, 8), max_axes=3)
    assert [m.axis_sizes for m in inside] == [(8,), (2, 4), (2, 2, 2)]
    assert [m.axis_sizes for m in logical_meshes(Submesh(4, 1))] == [(4,), (2, 2)]
    assert [m.axis_sizes for m in logical_meshes(Submesh(1, 1), max_axes=3)] == [(1,)]


def test_views_over_nodes() -> None:
    """Axis sizes, and how many of each axis's devices lie in one node."""
    views = logical_meshes(Submesh(4, 8), max_axes=3)
    assert [(m.axis_sizes, m.ranks_per_node) for m in views] == [
        ((32,), (8,)),
        ((4, 8), (1, 8)),
        ((8, 4), (2, 4)),
        ((16, 2), (4, 2)),
        ((4, 2, 4), (1, 2, 4)),
        ((2, 2, 8), (1, 1, 8)),
    ]
    assert [m.crosses_nodes for m in views[2:5]] == [(True, False)] * 2 + [(True, False, False)]


def test_a_pinned_view_may_fit_the_nodes_badly() -> None:
    assert Submesh(3, 4).view((2, 6)).ranks_per_node == (1, 2)  # nodes of 4, and 4 and 2
    assert Submesh(3, 4).view((4, 3)).ranks_per_node == (1, 1)


def test_parts_of_axes_are_where_the_ranks_are() -> None:
    for mesh in logical_meshes(Submesh(6, 4), max_axes=3):
        for axis, inside in enumerate(mesh.ranks_per_node):
            for group in mesh.groups(axis):
                nodes = Counter(rank // 4 for rank in group)
                assert set(nodes.values()) == {inside}
