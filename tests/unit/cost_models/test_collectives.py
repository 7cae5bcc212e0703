"""Collectives against hand numbers, and their growth with bytes, ranks and slower links."""

import numpy as np
import pytest

from cost_models import (
    AffineCost,
    CollectiveKind,
    CostModelError,
    Link,
    LinkPath,
    collective_coefficients,
    collective_s,
    link,
)

# 1 us a hop, 100 GB/s achieved, 10 us a call.
TOY = Link(
    name="toy",
    latency_s=1e-6,
    bandwidth_bytes_per_s=200e9,
    efficiency=0.5,
    launch_s=10e-6,
    source="made up",
)
SLOW = Link(
    name="slow",
    latency_s=5e-6,
    bandwidth_bytes_per_s=10e9,
    efficiency=1.0,
    launch_s=20e-6,
    source="made up",
)


@pytest.mark.parametrize(
    ("kind", "expected_us"),
    [  # 4 ranks, 100 MB: one crossing of all bytes takes 1000 us
        (CollectiveKind.ALL_REDUCE, 10 + 6 + 1500),
        (CollectiveKind.ALL_GATHER, 10 + 3 + 750),
        (CollectiveKind.REDUCE_SCATTER, 10 + 3 + 750),
        (CollectiveKind.ALL_TO_ALL, 10 + 3 + 750),
        (CollectiveKind.BROADCAST, 10 + 3 + 1000),
        (CollectiveKind.SEND, 10 + 1 + 1000),
    ],
)
def test_hand_numbers(kind: CollectiveKind, expected_us: float) -> None:
    assert collective_s(kind, 100e6, 4, TOY) == pytest.approx(expected_us * 1e-6)


@pytest.mark.parametrize("kind", CollectiveKind)
def test_one_rank_is_free(kind: CollectiveKind) -> None:
    assert collective_coefficients(kind, 1, TOY) == AffineCost(0.0, 0.0)
    assert collective_s(kind, 1e9, 1, TOY) == 0.0


@pytest.mark.parametrize("kind", CollectiveKind)
def test_monotone(kind: CollectiveKind) -> None:
    sizes = np.geomspace(1, 1e10, 30)
    for num_ranks in (2, 4, 8, 64):
        seconds = collective_s(kind, sizes, num_ranks, TOY)
        assert np.all(np.diff(seconds) > 0)
        assert np.all(collective_s(kind, sizes, 2 * num_ranks, TOY) >= seconds)
        assert np.all(collective_s(kind, sizes, num_ranks, SLOW) > seconds)


def test_all_reduce_is_reduce_scatter_then_all_gather_in_one_call() -> None:
    whole = collective_coefficients(CollectiveKind.ALL_REDUCE, 8, TOY)
    halves = [
        collective_coefficients(kind, 8, TOY)
        for kind in (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER)
    ]
    assert whole.seconds_per_byte == pytest.approx(sum(h.seconds_per_byte for h in halves))
    assert whole.latency_s + TOY.launch_s == pytest.approx(sum(h.latency_s for h in halves))


def test_arrays_elementwise() -> None:
    sizes = np.array([0, 1024, 2**28])
    seconds = collective_s(CollectiveKind.ALL_GATHER, sizes, 8, TOY)
    assert seconds.shape == (3,)
    for size, value in zip(sizes, seconds, strict=True):
        assert value == collective_s(CollectiveKind.ALL_GATHER, int(size), 8, TOY)


def test_bad_rank_counts() -> None:
    with pytest.raises(CostModelError, match="all_reduce needs at least 1 rank; got num_ranks=0"):
        collective_s(CollectiveKind.ALL_REDUCE, 1, 0, TOY)
    with pytest.raises(CostModelError, match="ranks_per_node of a link path must be at least 1"):
        LinkPath(TOY, SLOW, ranks_per_node=0, num_nodes=2)
    path = LinkPath(TOY, SLOW, ranks_per_node=4, num_nodes=2)
    with pytest.raises(CostModelError, match="all_gather of 4 ranks got a path of 2 nodes x 4"):
        collective_s(CollectiveKind.ALL_GATHER, 1, 4, path)


def test_path_inside_one_node_or_with_one_rank_a_node_is_that_link() -> None:
    for kind in CollectiveKind:
        assert LinkPath(TOY, SLOW, ranks_per_node=8, num_nodes=1).bottleneck(kind) == TOY
        assert LinkPath(TOY, SLOW, ranks_per_node=1, num_nodes=8).bottleneck(kind) == SLOW


def test_ring_across_nodes_uses_each_ranks_card() -> None:
    # 4 ranks a node, 10 GB/s each out of the node: 40 GB/s; 2 of 8 hops between nodes.
    path = LinkPath(TOY, SLOW, ranks_per_node=4, num_nodes=2)
    ring = path.bottleneck(CollectiveKind.ALL_REDUCE)
    assert ring.achieved_bytes_per_s == pytest.approx(40e9)
    assert ring.latency_s == pytest.approx((2 * 5e-6 + 6 * 1e-6) / 8)
    assert ring.launch_s == 20e-6
    # With 16 ranks a node the cards are faster than the links inside.
    wide = LinkPath(TOY, SLOW, ranks_per_node=16, num_nodes=2)
    assert wide.bottleneck(CollectiveKind.ALL_GATHER).achieved_bytes_per_s == pytest.approx(100e9)


def test_all_to_all_across_nodes_is_bound_by_a_ranks_own_card() -> None:
    # 8 ranks, 80 MB: 7 blocks of 10 MB, 4 of them through 10 GB/s; the 3 inside take less.
    path = LinkPath(TOY, SLOW, ranks_per_node=4, num_nodes=2)
    seconds = collective_s(CollectiveKind.ALL_TO_ALL, 80e6, 8, path)
    assert seconds == pytest.approx(20e-6 + 4 * 5e-6 + 3 * 1e-6 + 4 * 10e6 / 10e9)


def test_send_across_nodes_takes_the_link_between_them() -> None:
    path = LinkPath(TOY, SLOW, ranks_per_node=4, num_nodes=2)
    assert collective_s(CollectiveKind.SEND, 10e6, 2, path) == pytest.approx(20e-6 + 5e-6 + 1e-3)


def test_faster_generations_are_faster() -> None:
    names = ("nvlink4", "nvlink3", "nvlink2", "ib-400g", "ib-200g", "eth-25g")
    seconds = [collective_s(CollectiveKind.ALL_REDUCE, 2**28, 8, link(name)) for name in names]
    assert seconds == sorted(seconds)
