"""Stage tables from layers: exact for one layer, near the whole solve for more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autopar.graph.program import Graph, Operator, Phase, Ref, TensorMeta
from autopar.intraop.compose import (
    Point,
    boundary_bytes,
    layer_points,
    stage_mixture,
    stage_seconds,
)
from autopar.intraop.stage import SolverOptions, solve_stage
from autopar.intraop.stage_problem import StageContext
from autopar.lowering.lower import prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import stage_graph
from autopar.plan import Remat
from autopar.sharding.registry import RuleTable
from tests.unit.intraop.stages import costs_of, gpt2_graph, llama_graph, stage_of

aten = torch.ops.aten
CONTEXT = StageContext(num_microbatches=4)


def test_one_layer_is_its_own_solve() -> None:
    stage, costs = stage_of("attention"), costs_of((2, 2))
    points = layer_points(stage.graph, stage.table, costs, CONTEXT)
    found = solve_stage(stage.graph, stage.table, costs, CONTEXT, budget_bytes=None)
    assert points[0].seconds == pytest.approx(found.seconds, rel=1e-3)
    assert points[0].held_bytes == pytest.approx(found.prediction.weight_bytes)
    one = np.array([[1]])
    assert stage_seconds([points], one, 1, 1e15)[0] == pytest.approx(found.seconds, rel=1e-3)
    assert np.isinf(stage_seconds([points], one, 1, 1.0)).all()


def test_tables_by_hand() -> None:
    fast, small = Point(1.0, 80.0, 10.0, 5.0), Point(3.0, 40.0, 5.0, 4.0)
    counts = np.array([[1], [2]])
    once, twice = (stage_seconds([(fast, small)], counts, f, 100.0) for f in (1, 2))
    assert once[0] == 1.0  # 80 + 10 + 5
    # 2 (80 + 10) + 5 = 185 does not fit, 2 (40 + 5) + 4 = 94 does: 85 / 91 of the way
    assert once[1] == pytest.approx(2.0 + 4.0 * 85 / 91)
    # 80 + 20 + 5 = 105 does not fit, 40 + 10 + 4 = 54 does: 5 / 51 of the way
    assert twice[0] == pytest.approx(1.0 + 2.0 * 5 / 51)
    assert np.isinf(twice[1])  # 2 (40 + 10) + 4
    mixture = stage_mixture([(fast, small)], np.array([2]), 1, 100.0)
    assert mixture is not None and mixture.fast == (fast,) and mixture.small == (small,)
    assert mixture.share == pytest.approx(85 / 91)


@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_add_up_to_the_stage(name: str, mesh: tuple[int, ...]) -> None:
    graph = {
        "gpt2": lambda: gpt2_graph(4, 512, 2, n_embd=512, n_head=8, vocab_size=8192),
        "llama": lambda: llama_graph(
            4, 512, 2, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
            vocab_size=8192,
        ),
    }[name]()  # fmt: skip
    graph = apply_recompute(graph, Remat.SELECTIVE)
    table, costs, last = RuleTable(graph), costs_of(mesh), len(graph.layer_names) - 1
    prepared = [prepare_stage(stage_graph(graph, k, k), table.dims) for k in range(last + 1)]
    points = [layer_points(p.graph, p.table, costs, CONTEXT) for p in prepared]
    whole = prepare_stage(stage_graph(graph, 0, last), table.dims)
    every = np.ones((1, last + 1), dtype=np.int64)
    options = SolverOptions(time_limit_s=10.0, fallback=False)

    def exact(budget: float | None) -> tuple[float, float]:
        found = solve_stage(
            whole.graph, whole.table, costs, CONTEXT, budget_bytes=budget, options=options
        )
        return found.seconds, found.prediction.peak_bytes

    free, peak = exact(None)
    for budget, solved in ((1e15, free), (0.85 * peak, exact(0.85 * peak)[0])):
        composed = float(stage_seconds(points, every, 1, budget)[0])
        error = composed / solved - 1
        print(f"{name} {mesh} budget {budget:.3g}: composed / exact - 1 = {error:+.2%}")
        assert -0.05 <= error <= 0.1


def test_boundary_bytes_by_hand() -> None:
    meta = TensorMeta((4,), torch.float32)

    def op(name: str, layer: int, phase: Phase, *reads: str) -> Operator:
        args = tuple(map(Ref, reads))
        return Operator(name, aten.add.Tensor, args, {}, (meta,), phase, layer=layer)

    operators = (
        op("a", 0, Phase.FORWARD),
        op("b", 1, Phase.FORWARD, "a"),
        op("c", 2, Phase.FORWARD, "a", "b"),
        op("gc", 2, Phase.BACKWARD, "c"),
        op("gb", 1, Phase.BACKWARD, "gc"),
        op("ga", 0, Phase.BACKWARD, "gb"),
    )
    graph = Graph((), operators, (), layer_names=("0", "1", "2"))
    # into 1: a, and gb back; into 2: a, b, and gc back
    assert boundary_bytes(graph).tolist() == [0.0, 32.0, 48.0]
