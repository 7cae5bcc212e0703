"""Seconds of a collective, affine in its bytes: seconds(S) = latency_s + seconds_per_byte * S.

n ranks in a ring, a seconds a hop, b achieved bytes per second of one rank in one direction, c
fixed seconds of the call (host, kernel start), S bytes:

    all_gather       c + (n-1) a + (n-1)/n S/b      S = the gathered output
    reduce_scatter   c + (n-1) a + (n-1)/n S/b      S = the unreduced input
    all_reduce       c + 2(n-1) a + 2(n-1)/n S/b    S = the buffer
    all_to_all       c + (n-1) a + (n-1)/n S/b      S = one rank's local buffer
    broadcast        c + (n-1) a + S/b              S = the message, pipelined along the ring
    send             c + a + S/b                    S = the message

One rank costs 0. Sources: Patarasuk & Yuan, JPDC 69(2), 2009, for the ring all-reduce and its two
halves, bandwidth-optimal; Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, for the ring all-gather
and the pairwise all-to-all; NCCL for the pipelined broadcast. Each formula takes O(1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cost_models.errors import CostModelError
from cost_models.hardware import Link


class CollectiveKind(StrEnum):
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    SEND = "send"


@dataclass(frozen=True, slots=True)
class AffineCost:
    latency_s: float
    seconds_per_byte: float

    @overload
    def seconds(self, size_bytes: float) -> float: ...
    @overload
    def seconds(self, size_bytes: NDArray[Any]) -> NDArray[np.float64]: ...
    def seconds(self, size_bytes: float | NDArray[Any]) -> float | NDArray[np.float64]:
        """Elementwise over an array of sizes."""
        return self.latency_s + self.seconds_per_byte * size_bytes


# One rank: there is nobody to talk to.
NO_COST = AffineCost(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class LinkPath:
    """The way of a group of `num_nodes * ranks_per_node` ranks: `intra` in nodes, `inter` between.

    All devices of a node are taken to use their share of `inter` at the same time, as the groups of
    one mesh axis do. A ring then crosses each node border through as many cards as the group has
    ranks in a node (NCCL builds one ring a card), and `num_nodes` of its hops are between nodes.
    """

    intra: Link
    inter: Link
    ranks_per_node: int
    num_nodes: int

    def __post_init__(self) -> None:
        for key in ("ranks_per_node", "num_nodes"):
            value = getattr(self, key)
            if value < 1:
                raise CostModelError(f"{key} of a link path must be at least 1; got {value}.")

    @property
    def num_ranks(self) -> int:
        return self.ranks_per_node * self.num_nodes

    def bottleneck(self, kind: CollectiveKind) -> Link:
        """The one link that `kind` over this path behaves like."""
        if self.num_nodes == 1:
            return self.intra
        if self.ranks_per_node == 1 or kind is CollectiveKind.SEND:
            return self.inter
        near, far = self.intra.achieved_bytes_per_s, self.inter.achieved_bytes_per_s
        r, n = self.ranks_per_node, self.num_ranks
        if kind is CollectiveKind.ALL_TO_ALL:
            # Of its n-1 blocks a rank sends n-r through its share of `inter`, r-1 inside, at once.
            bandwidth_bytes_per_s = (n - 1) / max((n - r) / far, (r - 1) / near)
            far_hops = (n - r) / (n - 1)
        else:
            bandwidth_bytes_per_s = min(near, r * far)
            far_hops = self.num_nodes / n
        return Link(
            name=f"{self.intra.name}/{self.inter.name}",
            latency_s=far_hops * self.inter.latency_s + (1 - far_hops) * self.intra.latency_s,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            efficiency=1.0,
            launch_s=max(self.intra.launch_s, self.inter.launch_s),
            source=f"derived from {self.intra.name} and {self.inter.name} by LinkPath",
        )


# By kind, of n ranks: hops on the longest way, and how many times S crosses one rank's link.
_RING: dict[CollectiveKind, Callable[[int], tuple[int, float]]] = {
    CollectiveKind.ALL_REDUCE: lambda n: (2 * (n - 1), 2 * (n - 1) / n),
    CollectiveKind.ALL_GATHER: lambda n: (n - 1, (n - 1) / n),
    CollectiveKind.REDUCE_SCATTER: lambda n: (n - 1, (n - 1) / n),
    CollectiveKind.ALL_TO_ALL: lambda n: (n - 1, (n - 1) / n),
    CollectiveKind.BROADCAST: lambda n: (n - 1, 1.0),
    CollectiveKind.SEND: lambda n: (1, 1.0),
}


def collective_coefficients(
    kind: CollectiveKind, num_ranks: int, link: Link | LinkPath
) -> AffineCost:
    """The affine cost of one collective; the module's docstring says which bytes count."""
    if num_ranks < 1:
        raise CostModelError(f"{kind} needs at least 1 rank; got num_ranks={num_ranks}.")
    if isinstance(link, LinkPath):
        if kind is not CollectiveKind.SEND and link.num_ranks != num_ranks:
            raise CostModelError(
                f"{kind} of {num_ranks} ranks got a path of {link.num_nodes} nodes x "
                f"{link.ranks_per_node} ranks. Pass the path of the whole group."
            )
        link = link.bottleneck(kind)
    if num_ranks == 1:
        return NO_COST
    hops, crossings = _RING[kind](num_ranks)
    return AffineCost(
        latency_s=link.launch_s + hops * link.latency_s,
        seconds_per_byte=crossings / link.achieved_bytes_per_s,
    )


@overload
def collective_s(
    kind: CollectiveKind, size_bytes: float, num_ranks: int, link: Link | LinkPath
) -> float: ...
@overload
def collective_s(
    kind: CollectiveKind, size_bytes: NDArray[Any], num_ranks: int, link: Link | LinkPath
) -> NDArray[np.float64]: ...
def collective_s(
    kind: CollectiveKind, size_bytes: float | NDArray[Any], num_ranks: int, link: Link | LinkPath
) -> float | NDArray[np.float64]:
    """Seconds of one collective; the module's docstring says which bytes count."""
    return collective_coefficients(kind, num_ranks, link).seconds(size_bytes)
