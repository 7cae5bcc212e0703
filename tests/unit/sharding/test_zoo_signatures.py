"""The rule oracle on what models really call: every distinct signature of the zoo, with its
values."""

from __future__ import annotations

import pytest
import torch

from autopar.graph.capture import capture_graph
from autopar.graph.execute import graph_inputs
from autopar.graph.precision import in_float64
from autopar.sharding.registry import RuleTable
from tests.oracles import MESHES, disagreements, samples, widened
from tests.zoo import ZOO


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_signature_of_a_model(name: str) -> None:
    module, batch = ZOO[name]()
    graph = in_float64(capture_graph(module, batch))
    inputs = graph_inputs(graph, module.double(), widened(batch), seed=3)
    generator = torch.Generator().manual_seed(0)
    rules = checked = 0
    wrong = []
    for sample in samples(graph, inputs):
        rules += 1
        for mesh in MESHES:
            tried, found = disagreements(sample, mesh, generator=generator)
            checked += tried
            wrong += found
    print(f"rules x strategies: {rules} signatures, {checked} checked, {len(wrong)} wrong")
    assert not wrong, str(wrong[0])


@pytest.mark.parametrize("name", ZOO)
def test_no_operator_of_the_zoo_is_without_a_rule(name: str) -> None:
    assert not RuleTable(capture_graph(*ZOO[name]())).fallbacks
