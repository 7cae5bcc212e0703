"""Costs on one mesh: zero where nothing happens, shared work is cheaper, reshards are steps."""

from __future__ import annotations

import pytest
import torch

from autopar.estimate import (
    EXPERT_IMBALANCE,
    MeshCosts,
    OptimizerModel,
    local_bytes,
    local_numel,
)
from autopar.graph.program import TensorMeta
from autopar.graph.work import is_view
from autopar.mesh import LogicalMesh, Submesh
from autopar.sharding.registry import rule_for
from autopar.sharding.strategy import strategies
from cost_models import Cluster, CollectiveKind, collective_coefficients
from tests.oracles import make_sample
from tests.unit.intraop.stages import costs_of, stage_of

PARTIAL, REPLICATE = -2, -1
META, DIMS = TensorMeta((8, 4), torch.float32), ((8,), (4,))


def test_local_sizes() -> None:
    assert local_bytes(META, DIMS, (0, REPLICATE), (2, 4)) == 64
    assert local_bytes(META, DIMS, (0, 0), (2, 4)) == 16
    assert local_bytes(META, DIMS, (PARTIAL, REPLICATE), (2, 4)) == 128
    assert local_numel(META, DIMS, (REPLICATE, 1), (2, 4)) == 8


def test_reshards() -> None:
    costs = costs_of((4,))
    assert costs.reshard((), (0,), (0,)).seconds(1e9) == 0.0
    link = costs.mesh.path(0, costs.cluster)
    gather = collective_coefficients(CollectiveKind.ALL_GATHER, 4, link)
    assert costs.reshard((), (0,), (REPLICATE,)).seconds(1e9) == pytest.approx(gather.seconds(1e9))
    reduce = collective_coefficients(CollectiveKind.ALL_REDUCE, 4, link).seconds(1e9)
    assert costs.reshard((), (PARTIAL,), (REPLICATE,)).seconds(1e9) == pytest.approx(reduce)
    transposed = costs.reshard((), (1,), (REPLICATE,)).seconds(1e9)
    assert transposed > costs.reshard((), (0,), (REPLICATE,)).seconds(1e9)
    table = costs.reshard_seconds((), [(0,), (REPLICATE,)], [(0,), (1,), (0,)], 1e6)
    assert table.shape == (2, 3) and table[0, 0] == table[0, 2] == 0.0
    assert table[0, 1] == costs.reshard((), (0,), (1,)).seconds(1e6)


def test_only_what_stays_in_a_node_is_hidden() -> None:
    """And only the collective: copies that transpose its result take their time."""
    costs = MeshCosts(Cluster.parse("h100:2x2"), LogicalMesh((2, 2), (True, False)))
    gathered = (REPLICATE, REPLICATE)
    for source, hidden in (((0, REPLICATE), False), ((REPLICATE, 0), True)):
        whole, exposed = (costs.reshard((), source, gathered, share) for share in (1.0, 0.25))
        factor = 0.25 if hidden else 1.0
        assert exposed.seconds(1e9) == pytest.approx(factor * whole.seconds(1e9))
    copied, whole, exposed = (
        costs.reshard((), (REPLICATE, number), gathered, share).seconds(1e9)
        for number, share in ((1, 0.25), (1, 1.0), (0, 1.0))
    )
    assert copied == pytest.approx(whole - 0.75 * exposed)


def test_an_axis_across_nodes_is_slower() -> None:
    cluster = Cluster.parse("h100:2x2")
    costs = MeshCosts(cluster, LogicalMesh((2, 2), (True, False)))
    slow = costs.reshard((), (PARTIAL, REPLICATE), (REPLICATE, REPLICATE)).seconds(1e8)
    fast = costs.reshard((), (REPLICATE, PARTIAL), (REPLICATE, REPLICATE)).seconds(1e8)
    assert slow > 2 * fast


def milliseconds(costs: MeshCosts, axis: int, nbytes: float) -> float:
    """Of an all-reduce of nbytes on each device over one axis."""
    before = [REPLICATE] * costs.mesh.num_axes
    before[axis] = PARTIAL
    after = (REPLICATE,) * costs.mesh.num_axes
    return 1e3 * costs.reshard((), tuple(before), after).seconds(nbytes)


@pytest.mark.parametrize(
    ("shape", "expected"),  # by hand: 42.5 GB/s a card, 342 over NVLink
    [
        ((128,), (6.431,)),
        ((16, 8), (44.283, 5.189)),
        ((32, 4), (23.022, 4.442)),
        ((64, 2), (11.931, 2.973)),
    ],
)
def test_all_reduce_of_a_gigabyte_over_sixteen_nodes(
    shape: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    cluster = Cluster.parse("h100:16x8")
    costs = MeshCosts(cluster, Submesh(16, 8).view(shape))
    found = tuple(milliseconds(costs, axis, 1e9) for axis in range(len(shape)))
    assert found == pytest.approx(expected, abs=5e-4)


def test_one_axis_over_all_nodes_competes_with_two() -> None:
    """Flat, or in node, between nodes and in node again: within a factor of two of each other."""
    cluster = Cluster.parse("h100:16x8")
    flat = MeshCosts(cluster, Submesh(16, 8).view((128,)))
    grid = MeshCosts(cluster, Submesh(16, 8).view((16, 8)))
    inside = milliseconds(grid, 1, 1e9)
    nested = inside + milliseconds(grid, 0, 1e9 / 8)
    assert nested / 2 < milliseconds(flat, 0, 1e9) < nested


def test_each_group_has_its_own_device_and_links() -> None:
    cluster = Cluster.parse("h100:1x8+a100:2x8")
    fast, slow = (MeshCosts(cluster, Submesh(1, 8, group).view((8,))) for group in (0, 1))
    assert (fast.device.name, slow.device.name) == ("h100", "a100")
    assert milliseconds(fast, 0, 1e9) < milliseconds(slow, 0, 1e9)
    assert fast.receive_seconds(1e8) == slow.receive_seconds(1e8)  # between nodes


def test_operators_get_cheaper_when_shared() -> None:
    stage, costs = stage_of("mlp"), costs_of((2,))
    metas = stage.graph.metas()
    for op in stage.graph.operators:
        call, rule = stage.table.calls[op.name], stage.table.rules[op.name]
        choices = strategies(rule, call.operands, (2,))
        seconds = costs.operator_seconds(op, call, rule, choices, metas)
        assert (seconds >= 0).all() and seconds.shape == (len(choices),)
        whole = seconds[0]  # the replicated one comes first
        if is_view(op):
            assert not seconds.any()
        for strategy, cost in zip(choices, seconds, strict=True):
            if strategy.num_splits == 2:
                assert cost <= whole


def test_optimizers() -> None:
    cluster, mesh = Cluster.parse("h100:1x2"), LogicalMesh((2,))
    adam, sgd = MeshCosts(cluster, mesh), MeshCosts(cluster, mesh, OptimizerModel(0.0, 12.0))
    assert adam.optimizer_seconds(1e6) == pytest.approx(28 / 12 * sgd.optimizer_seconds(1e6))
    assert adam.receive_seconds(2e8) > adam.receive_seconds(1e8) > 0


def test_rows_that_go_to_their_experts_are_charged() -> None:
    """Twice T/4 K H elements along the axis, by the busiest device; its matmuls wait as well."""
    rows, index = torch.zeros(64, 32), torch.zeros(64, 2, dtype=torch.int64)
    args = (rows, index, torch.zeros(64, 2), torch.zeros(8, 2, 16, 32), torch.zeros(8, 32, 16))
    sample = make_sample(torch.ops.autopar.experts.default, (*args, "silu", 0, 8))
    metas = {
        ref: TensorMeta(tuple(t.shape), t.dtype)
        for ref, t in zip(sample.op.operands, sample.operands, strict=True)
    }
    costs = costs_of((4,))
    rule = rule_for(sample.call)
    choices = strategies(rule, sample.call.operands, (4,))
    seconds = costs.operator_seconds(sample.op, sample.call, rule, choices, metas)
    by_name = dict(zip((s.text for s in choices), seconds, strict=True))
    link = costs.mesh.path(0, costs.cluster)
    exchange = collective_coefficients(CollectiveKind.ALL_TO_ALL, 4, link)
    moved = exchange.seconds(rows.nbytes / 4 * 2 * EXPERT_IMBALANCE)
    assert by_name["x"] > 2 * moved + exchange.seconds(0)
    assert by_name["-"] > by_name["e"] and by_name["x"] > by_name["t"]


def test_padding_is_counted() -> None:
    """Five rows on four devices are two on each."""
    dims, costs = ((5,),), costs_of((4,))
    meta = TensorMeta((5,), torch.float32)
    assert local_bytes(meta, dims, (0,), (4,)) == 8 and local_numel(meta, dims, (0,), (4,)) == 2
    assert costs.uneven(dims) == dims and costs.uneven(((8,), (4,))) == ()
    for source, target in (((0,), (REPLICATE,)), ((PARTIAL,), (0,))):
        even, uneven = (costs.reshard(d, source, target).seconds(1e9) for d in ((), dims))
        assert uneven > even
