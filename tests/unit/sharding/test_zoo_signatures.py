"""The rule oracle on what models really call: distinct signatures of the zoo, with their values.

A signature that several models have is checked once. CI checks those of eight models;
`python -m benchmarks.signatures` those of all 31.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from autopar.graph.capture import capture_graph
from autopar.graph.program import Graph
from autopar.graph.work import operator_flops
from autopar.sharding.registry import RuleTable
from autopar.sharding.rule import Call
from benchmarks.signatures import check_signatures
from tests.zoo import CORE, ZOO

_MAX_REPLICATED = 0.01  # of the FLOPs of a model


@cache
def _graph(name: str) -> Graph:
    return capture_graph(*ZOO[name]())


@cache
def _seen() -> set[Call]:
    """Signatures that this process has checked."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("name", CORE)
def test_every_signature_of_a_model(name: str) -> None:
    module, batch = ZOO[name]()
    generator = torch.Generator().manual_seed(0)
    outcome = check_signatures(_graph(name), module, batch, _seen(), generator)
    assert not outcome.wrong, str(outcome.wrong[0])


@pytest.mark.parametrize("name", ZOO)
def test_no_operator_of_the_zoo_is_without_a_rule(name: str) -> None:
    graph = _graph(name)
    table, metas = RuleTable(graph), graph.metas()
    assert not table.fallbacks
    flops = {op.name: operator_flops(op, metas) for op in graph.operators}
    whole = sum(n for op, n in flops.items() if not any(f.splits for f in table.rules[op].factors))
    assert whole <= _MAX_REPLICATED * sum(flops.values())
