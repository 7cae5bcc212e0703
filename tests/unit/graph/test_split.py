"""Backward in two parts: what is sent first, then what only parameter gradients need."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import InternalError
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph, OutputKind, Phase
from autopar.graph.split import check_split, held_values, weight_operators
from autopar.lowering.lower import prepare_stages
from autopar.lowering.parts import parts_of
from autopar.plan import Remat
from tests.golden.update import Mlp


def stages() -> tuple[Graph, Graph]:
    """down(relu(up(x))) cut behind relu."""
    graph = cluster_layers(capture_graph(Mlp(8, 16), (torch.empty(4, 8),)), 2)
    first, second = prepare_stages(graph, Remat.NONE, (0, 1))
    return first.graph, second.graph


def targets(graph: Graph, names: frozenset[str]) -> list[str]:
    wanted = [op for op in graph.operators if op.name in names]
    return [op.op_name for op in wanted if "hub" not in op.op_name]


def test_the_first_stage_sends_nothing_back() -> None:
    first, _ = stages()
    backward = {op.name for op in first.operators if op.phase is Phase.BACKWARD}
    assert weight_operators(first) == backward


def test_a_later_stage_sends_first() -> None:
    _, second = stages()
    weights = weight_operators(second)
    assert targets(second, weights).count("aten.mm.default") == 1
    (sent,) = [o for o in second.outputs if o.kind is OutputKind.SENT]
    assert sent.ref.name not in weights
    (gradient,) = second.outputs_of(OutputKind.GRADIENT)
    assert gradient.ref.name in weights
    held = held_values(second, weights)
    assert held and not {ref.name for ref in held} & weights


def test_the_parts_partition_the_operators() -> None:
    for graph in stages():
        forward, backward, weights = parts_of(graph, split=True)
        assert parts_of(graph, split=False)[0] == forward
        names = [op.name for part in (forward, backward, weights) for op in part.operators]
        assert sorted(names) == sorted(op.name for op in graph.operators)
        made = {op.name for op in backward.operators}
        assert {ref.name for ref in backward.leaves} <= made


def test_the_verifier_refuses_other_splits() -> None:
    _, second = stages()
    right = weight_operators(second)
    forward = next(op.name for op in second.operators if op.phase is Phase.FORWARD)
    (sent,) = [o for o in second.outputs if o.kind is OutputKind.SENT]
    with pytest.raises(InternalError, match="forward operator"):
        check_split(second, {*right, forward})
    with pytest.raises(InternalError, match="waits for parameter gradients"):
        check_split(second, {*right, sent.ref.name})
    backward = next(op for op in second.operators if op.phase is Phase.BACKWARD)
    with pytest.raises(InternalError, match="made after it"):
        check_split(second, {backward.name})
