"""Whole models under random plans: every operator any strategy, every input any layout.

The rule oracle proves rules one by one; this proves resharding, caching of resharded values, order
and results with several layouts. Loss, all gradients and buffers must be those of a single device.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from autopar.graph.capture import capture_graph
from autopar.graph.execute import graph_inputs, run_graph
from autopar.graph.precision import in_float64
from autopar.graph.program import Graph, Ref
from autopar.layout import replicated
from autopar.lowering import composites
from autopar.lowering.composites import Site
from autopar.mesh import LogicalMesh
from autopar.sharding.registry import RuleTable
from tests.oracles import Draw, relative_error, widened
from tests.uneven import UNEVEN
from tests.zoo import CORE

MESHES = (LogicalMesh((2,)), LogicalMesh((2, 2)))
MODELS = {**CORE, **UNEVEN}
DRAWS = 3
TOLERANCE = 1e-8
FLOOR = 1e-4  # of the largest gradient: what is zero in exact arithmetic is rounding noise


@lru_cache(maxsize=1)
def _model(name: str) -> tuple[Graph, RuleTable, dict[str, Tensor], list[Tensor]]:
    module, batch = MODELS[name]()
    graph = in_float64(capture_graph(module, batch))
    inputs = graph_inputs(graph, module.double(), widened(batch), seed=3)
    return graph, RuleTable(graph), inputs, run_graph(graph, inputs)


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_any_strategy_anywhere(name: str, mesh: LogicalMesh, draw: int) -> None:
    graph, table, inputs, want = _model(name)
    generator = torch.Generator().manual_seed(draw)
    plan = Draw.make(graph, table, mesh, generator)
    metas = graph.metas()
    whole = replicated(mesh.num_axes)
    outputs = {str(i): (out.ref, metas[out.ref], whole) for i, out in enumerate(graph.outputs)}
    got = plan.run(inputs, outputs, generator)
    scale = max(float(w.abs().max()) for w in want if w.is_floating_point() and w.numel())
    for number, tensor in enumerate(want):
        error = relative_error(got[str(number)], tensor, floor=FLOOR * scale)
        if not error <= TOLERANCE:
            where = plan.first_wrong(inputs, generator)
            pytest.fail(f"{graph.outputs[number]} is off by {error:.3g}; first: {where}")


def test_a_wrong_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that draws its mask from local positions: the first one that is sharded."""
    graph, table, inputs, _ = _model("gpt2")
    generator = torch.Generator().manual_seed(0)
    plan = Draw.make(graph, table, LogicalMesh((2,)), generator)
    assert not plan.first_wrong(inputs, generator)

    def local_mask(site: Site) -> tuple[Ref, ...]:
        shape = site.result_shape()
        return site.call_with({4: shape, 5: shape, 6: [0] * len(shape), 7: len(shape) - 1})

    dropout = torch.ops.autopar.dropout.default
    monkeypatch.setattr(composites, "LOWERINGS", {**composites.LOWERINGS, dropout: local_mask})
    assert "autopar.dropout" in plan.first_wrong(inputs, generator)
