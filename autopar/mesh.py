"""Submeshes of a cluster, and the logical meshes that they can be seen as.

A submesh is what one pipeline stage runs on: (1, 2^k) devices inside a node, or whole nodes (Alpa,
OSDI'22, section 5.2), all of one node group. A logical mesh is a submesh seen as a grid with named
axes, slowest link first, so that axis 0 is the major one wherever two axes shard the same part of a
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.errors import MeshError
from cost_models import Cluster, LinkPath, NodeGroup

AXIS_NAMES = ("x", "y", "z")

# Up to so many nodes (or units of nodes) a submesh has any number of them; above, see
# `_node_counts`. Alpa's choice for its 8 nodes.
_ANY_NUMBER = 8

# No submesh is finer than this part of the cluster, unless the model has more layers than that.
_FINEST_SHARE = 128


@dataclass(frozen=True, slots=True)
class Submesh:
    """num_nodes x devices_per_node devices of one node group of the cluster."""

    num_nodes: int
    devices_per_node: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.devices_per_node < 1:
            raise MeshError(f"a submesh has at least one device: got {self}")

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def view(self, axis_sizes: tuple[int, ...]) -> LogicalMesh:
        """This submesh as a grid. Ranks are node by node, so of an axis with stride s and size n,
        the ranks i s, 0 <= i < n, of one node are runs of equal length where s divides the node.
        Where they are not equal, the shortest counts."""
        if math.prod(axis_sizes) != self.num_devices:
            raise MeshError(f"a view of {self} has {self.num_devices} devices: got {axis_sizes}")
        inside = []
        for axis, size in enumerate(axis_sizes):
            stride = math.prod(axis_sizes[axis + 1 :])
            even = self.devices_per_node % stride == 0
            inside.append(math.gcd(self.devices_per_node, stride * size) // stride if even else 1)
        crosses = tuple(n < size for n, size in zip(inside, axis_sizes, strict=True))
        return LogicalMesh(axis_sizes, crosses, tuple(inside), self.group)

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.devices_per_node}"


@dataclass(frozen=True, slots=True)
class LogicalMesh:
    """Devices of one stage seen as a grid; ranks are row-major over the axes.

    axis_sizes[i] devices along AXIS_NAMES[i]; crosses_nodes[i] says that the axis uses the slow
    link; ranks_per_node[i] of its devices then lie in each node, 1 unless given. group: of the
    cluster's node groups.
    """

    axis_sizes: tuple[int, ...]
    crosses_nodes: tuple[bool, ...] = ()
    ranks_per_node: tuple[int, ...] = ()
    group: int = 0

    def __post_init__(self) -> None:
        if not self.crosses_nodes:
            object.__setattr__(self, "crosses_nodes", (False,) * len(self.axis_sizes))
        if not 1 <= len(self.axis_sizes) <= len(AXIS_NAMES):
            raise MeshError(f"a mesh has 1 to {len(AXIS_NAMES)} axes: got {self.axis_sizes}")
        if len(self.crosses_nodes) != len(self.axis_sizes) or min(self.axis_sizes) < 1:
            raise MeshError(f"one size >= 1 and one link per axis: got {self!r}")
        if not self.ranks_per_node:
            axes = zip(self.axis_sizes, self.crosses_nodes, strict=True)
            object.__setattr__(self, "ranks_per_node", tuple(1 if c else n for n, c in axes))
        if len(self.ranks_per_node) != len(self.axis_sizes) or any(
            r < 1 or n % r for n, r in zip(self.axis_sizes, self.ranks_per_node, strict=True)
        ):
            raise MeshError(f"each node has an equal part of an axis: got {self!r}")

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

    def path(self, axis: int, cluster: Cluster) -> LinkPath:
        """What collectives over `axis` go through. Its groups all run at once, so that each device
        of a node uses its own share of the link between nodes, and no other."""
        inside = self.ranks_per_node[axis]
        intra = cluster.groups[self.group].intra
        return LinkPath(intra, cluster.inter, inside, self.axis_sizes[axis] // inside)

    def __str__(self) -> str:
        return "x".join(map(str, self.axis_sizes))


def least_devices(cluster: Cluster, num_layers: int = 1) -> tuple[int, ...]:
    """The fewest devices of a submesh of each group: the largest power of two within
    D_g / max(128, num_layers)^(1/G), with D_g devices in group g of G.

    In one group, an even cut into S <= num_layers stages gives each D / S devices, so that a
    smaller submesh is below every even share of a model of up to 128 layers, and a step from one
    size to the next is below 1 % of the cluster: stages can be as uneven as layers are. It bounds
    the inter-op program: 2 max(128, num_layers) states of used devices at most, however large the
    cluster. The states of groups multiply, hence the root: of two groups no stage has fewer than
    1/22 of its group.
    """
    parts = max(_FINEST_SHARE, num_layers) ** (1 / len(cluster.groups))
    shares = (int(group.num_devices / parts) for group in cluster.groups)
    return tuple(1 << max(0, share.bit_length() - 1) for share in shares)


def submeshes(cluster: Cluster, num_layers: int = 1) -> tuple[Submesh, ...]:
    """Submesh choices of each node group in order: (1, 2^k) inside a node, the whole node, then
    several whole nodes, up to all of the group.

    Any submeshes of these shapes whose devices sum to those of a group pack it (Alpa, OSDI'22,
    theorem 1): whole nodes are interchangeable, and inside a node each size divides the next, so
    that the larger ones first leave no hole. No submesh lies in two groups, hence the same holds
    for a cluster of several: group by group.
    """
    least = least_devices(cluster, num_layers)
    return tuple(
        submesh
        for index, group in enumerate(cluster.groups)
        for submesh in _group_submeshes(index, group, least[index])
    )


def _group_submeshes(index: int, group: NodeGroup, least: int) -> Iterator[Submesh]:
    nodes, per_node = group.num_nodes, group.devices_per_node
    sizes = [1 << k for k in range(per_node.bit_length())]
    for size in sizes:
        if least <= size < per_node and per_node % size == 0:
            yield Submesh(1, size, index)
    # Nodes are counted in units, so that sizes keep a common divisor: the program's states.
    unit = math.gcd(nodes, max(1, least // per_node))
    for count in _node_counts(nodes // unit):
        if count * unit * per_node >= least or count * unit == nodes:
            yield Submesh(count * unit, per_node, index)


def _node_counts(nodes: int) -> list[int]:
    """How many of so many nodes a submesh may have: every number up to 8 nodes; above, the powers
    of two, the divisors (equal stages) and nodes / 2^k rounded down and up.

    The last make every number of stages possible, 1 to `nodes`: halving one of the largest stages
    of such a cut, rounded down and up, gives a cut with one more. O(log nodes) sizes and divisors.
    """
    if nodes <= _ANY_NUMBER:
        return list(range(1, nodes + 1))
    counts = {divisor for divisor in range(1, nodes + 1) if nodes % divisor == 0}
    for power in (1 << k for k in range(nodes.bit_length())):
        counts |= {power, nodes // power, -(-nodes // power)}
    return sorted(counts)


def logical_meshes(submesh: Submesh, max_axes: int = 2) -> tuple[LogicalMesh, ...]:
    """The views of a submesh that differ in what they cost, with n nodes of p devices:

        one link (n = 1 or p = 1)    every grid of two or three axes; axes over the same link are
                                     interchangeable, so their sizes do not decrease
        1 axis                       (n p)
        2 axes, b divides p          (n p / b, b): the minor axis inside a node, the major one over
                                     the nodes and the p / b devices that are left in each
        3 axes                       (n, a, b) with a b = p, and (a, b, p) with a b = n

    With two axes the minor one, which has the frequent collectives, does not cross nodes.
    """
    nodes, devices = submesh.num_nodes, submesh.devices_per_node
    shapes: list[tuple[int, ...]] = [(nodes * devices,)]
    single = nodes == 1 or devices == 1
    if max_axes >= 2 and single:
        shapes += _grids(nodes * devices, 2)
    elif max_axes >= 2:
        sizes = [size for size in range(devices, 1, -1) if devices % size == 0]
        shapes += [(nodes * devices // size, size) for size in sizes]
    if max_axes >= 3 and single:
        shapes += _grids(nodes * devices, 3)
    elif max_axes >= 3:
        shapes += [(nodes, *grid) for grid in _grids(devices, 2)]
        shapes += [(*grid, devices) for grid in _grids(nodes, 2)]
    return tuple(submesh.view(shape) for shape in shapes)


def _grids(count: int, num_axes: int, least: int = 2) -> list[tuple[int, ...]]:
    """Products of num_axes non-decreasing factors, each at least `least`."""
    if num_axes == 1:
        return [(count,)] if count >= least else []
    return [
        (size, *rest)
        for size in range(least, math.isqrt(count) + 1)
        if count % size == 0
        for rest in _grids(count // size, num_axes - 1, size)
    ]
