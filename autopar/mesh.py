"""Submeshes of a cluster, and the logical meshes that they can be seen as.

A submesh is what one pipeline stage runs on: (1, 2^k) devices inside a node, or whole nodes (Alpa,
OSDI'22, section 5.2). A logical mesh is a submesh seen as a grid with named axes, slowest link
first, so that axis 0 is the major one wherever two axes shard the same part of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.errors import MeshError
from cost_models import Cluster, Link

AXIS_NAMES = ("x", "y", "z")


@dataclass(frozen=True, slots=True)
class Submesh:
    """num_nodes x devices_per_node devices."""

    num_nodes: int
    devices_per_node: int

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.devices_per_node < 1:
            raise MeshError(f"a submesh has at least one device: got {self}")

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.devices_per_node}"


@dataclass(frozen=True, slots=True)
class LogicalMesh:
    """Devices of one stage seen as a grid; ranks are row-major over the axes.

    axis_sizes[i] devices along AXIS_NAMES[i]; crosses_nodes[i] says that the axis uses the slow
    link.
    """

    axis_sizes: tuple[int, ...]
    crosses_nodes: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.crosses_nodes:
            object.__setattr__(self, "crosses_nodes", (False,) * len(self.axis_sizes))
        if not 1 <= len(self.axis_sizes) <= len(AXIS_NAMES):
            raise MeshError(f"a mesh has 1 to {len(AXIS_NAMES)} axes: got {self.axis_sizes}")
        if len(self.crosses_nodes) != len(self.axis_sizes) or min(self.axis_sizes) < 1:
            raise MeshError(f"one size >= 1 and one link per axis: got {self!r}")

    @property
    def num_devices(self) -> int:
        return math.prod(self.axis_sizes)

    @property
    def num_axes(self) -> int:
        return len(self.axis_sizes)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Grid coordinates of a rank of this mesh."""
        coords: list[int] = []
        for size in reversed(self.axis_sizes):
            coords.append(rank % size)
            rank //= size
        return tuple(reversed(coords))

    def rank(self, coords: tuple[int, ...]) -> int:
        """Inverse of `coordinates`."""
        rank = 0
        for coord, size in zip(coords, self.axis_sizes, strict=True):
            rank = rank * size + coord
        return rank

    def groups(self, axis: int) -> Iterator[tuple[int, ...]]:
        """The groups of ranks that differ in `axis` only, each in order of that coordinate."""
        stride = math.prod(self.axis_sizes[axis + 1 :])
        for rank in range(self.num_devices):
            if self.coordinates(rank)[axis] == 0:
                yield tuple(rank + i * stride for i in range(self.axis_sizes[axis]))

    def link(self, axis: int, cluster: Cluster) -> Link:
        """The link that collectives over `axis` use."""
        return cluster.inter if self.crosses_nodes[axis] else cluster.groups[0].intra

    def __str__(self) -> str:
        return "x".join(map(str, self.axis_sizes))


def submeshes(cluster: Cluster) -> tuple[Submesh, ...]:
    """Submesh choices: (1, 2^k) inside a node, the whole node, then 2, 3, ... whole nodes.

    Submeshes of these shapes always pack the cluster (Alpa, OSDI'22, theorem 1).
    """
    kinds = {group.device.name for group in cluster.groups}
    if len(kinds) > 1:
        names = ", ".join(sorted(kinds))
        raise MeshError(
            f"{cluster} mixes the device kinds {names}, which the planner cannot do yet: plan for "
            "one of them"
        )
    per_node = cluster.groups[0].devices_per_node
    if any(group.devices_per_node != per_node for group in cluster.groups):
        raise MeshError(f"nodes of one size only, for now: got {cluster}")
    sizes = [1]
    while sizes[-1] * 2 < per_node:
        sizes.append(sizes[-1] * 2)
    inside = [Submesh(1, size) for size in sizes if size < per_node and per_node % size == 0]
    return (*inside, *(Submesh(nodes, per_node) for nodes in range(1, cluster.num_nodes + 1)))


def logical_meshes(submesh: Submesh, max_axes: int = 2) -> tuple[LogicalMesh, ...]:
    """Every view of a submesh up to symmetry. Axes inside one link are interchangeable, so their
    sizes are in non-decreasing order; an axis either crosses nodes or does not."""
    views: list[LogicalMesh] = []
    nodes, devices = submesh.num_nodes, submesh.devices_per_node
    if nodes == 1:
        views.append(LogicalMesh((devices,)))
        if max_axes >= 2:
            views += [
                LogicalMesh((size, devices // size))
                for size in range(2, devices)
                if devices % size == 0 and size <= devices // size
            ]
        return tuple(views)
    if devices == 1:
        return (LogicalMesh((nodes,), (True,)),)
    views.append(LogicalMesh((nodes * devices,), (True,)))
    if max_axes >= 2:
        views.append(LogicalMesh((nodes, devices), (True, False)))
    return tuple(views)
