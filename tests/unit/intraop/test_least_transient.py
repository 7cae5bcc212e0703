"""The unavoidable transients are below those of every solution."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.intraop.build import StageContext, build_problem
from autopar.intraop.least_transient import least_transient_bytes
from autopar.intraop.memory_use import transient_bytes
from autopar.lowering.lower import prepare_stages
from autopar.plan import Remat
from tests.unit.intraop.stages import costs_of, gpt2_graph


@pytest.mark.parametrize("remat", Remat)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=str)
def test_no_assignment_has_less(mesh: tuple[int, ...], microbatches: int, remat: Remat) -> None:
    graph = gpt2_graph(4, 32, 2, n_embd=32, n_head=4, n_positions=32, vocab_size=64)
    (stage,) = prepare_stages(graph, remat, [0])
    context = StageContext(microbatches)
    built = build_problem(stage.graph, stage.table, costs_of(mesh), context)
    least = least_transient_bytes(stage.graph, built, mesh, microbatches)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(10):
        chosen = built.read([int(rng.integers(len(node.choices))) for node in built.nodes])
        found.append(
            transient_bytes(
                stage.graph,
                built.dims,
                chosen.strategies,
                chosen.inputs,
                mesh,
                outputs=chosen.outputs,
                num_microbatches=microbatches,
            )
        )
    assert 0 < least <= min(found)
