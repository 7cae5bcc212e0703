"""The row of the most crowded moment is never above what an assignment holds, and near it."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.graph.program import Graph, Phase
from autopar.intraop.build import build_problem
from autopar.intraop.crowded import with_moment
from autopar.intraop.execution import execution_of
from autopar.intraop.fold import fold_problem
from autopar.intraop.memory_use import crowded_moment, transient_bytes
from autopar.intraop.stage_problem import Fold, StageContext
from autopar.lowering.lower import prepare_stages
from autopar.plan import Remat
from tests.unit.intraop.stages import costs_of, gpt2_graph, image_graph


@pytest.mark.parametrize("remat", Remat)
@pytest.mark.parametrize(
    ("mesh", "microbatches", "folded", "compiled"),
    [((4,), 1, True, True), ((2, 2), 4, True, True), ((2, 2), 1, False, False)],
    ids=str,
)
def test_no_assignment_holds_less(
    mesh: tuple[int, ...], microbatches: int, folded: bool, compiled: bool, remat: Remat
) -> None:
    graph = gpt2_graph(4, 32, 4, n_embd=32, n_head=4, n_positions=32, vocab_size=64)
    check(graph, mesh, microbatches, folded=folded, compiled=compiled, remat=remat)


@pytest.mark.parametrize(("mesh", "near"), [((1,), 0.7), ((2, 2), 0.5)])
def test_gradients_as_convolutions_make_them(mesh: tuple[int, ...], near: float) -> None:
    """On more devices, in layouts at random, much of the peak is copies in other layouts."""
    check(image_graph(), mesh, 1, folded=False, compiled=True, remat=Remat.NONE, near=near)


def check(
    graph: Graph,
    mesh: tuple[int, ...],
    microbatches: int,
    *,
    folded: bool,
    compiled: bool,
    remat: Remat,
    near: float = 0.7,
) -> None:
    """near: the share of the peak that the row has at least."""
    (stage,) = prepare_stages(graph, remat, [0], compiled=compiled)
    folds = (Fold(2, 5),) if folded else ()
    context = StageContext(microbatches, in_flight=2, folds=folds, compiled=compiled)
    execution = execution_of(stage.graph, context)
    built = build_problem(stage.graph, stage.table, costs_of(mesh), context)
    built = fold_problem(built, stage.graph, folds) if folded else built
    phases = [op.phase for op in stage.graph.operators]
    moments = [(phase, t) for phase in Phase for t in range(1, phases.count(phase) + 1)]
    rng = np.random.default_rng(0)
    for _ in range(3):
        choice = tuple(int(rng.integers(len(node.choices))) for node in built.nodes)
        chosen = built.read(choice)
        layouts = stage.graph, built.dims, chosen.strategies, chosen.inputs, mesh
        alive = {"outputs": chosen.outputs, "copies": built.copies, "execution": execution}
        transient = transient_bytes(*layouts, **alive)
        peak = built.problem.bytes(choice) + transient
        crowded = crowded_moment(*layouts, **alive)
        for moment in (crowded, *(moments[i] for i in rng.integers(len(moments), size=6))):
            row = with_moment(stage.graph, built, moment, mesh, execution)
            assert row.bytes(choice) <= peak * (1 + 1e-9)
        row = with_moment(stage.graph, built, crowded, mesh, execution)
        assert row.bytes(choice) > near * peak
