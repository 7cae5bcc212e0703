"""The search against every plan of small graphs, against hand-made plans, and folded stages
against whole ones: a thrifty part of `benchmarks.exhaustive`, `handmade` and `folded`."""

from __future__ import annotations

import pytest
import torch

from autopar.api import ModelWorkload
from autopar.candidate import allowed_views
from autopar.graph.family import GraphFamily
from autopar.options import SearchOptions
from autopar.plan import Remat
from benchmarks import exhaustive, folded, handmade
from benchmarks.forced import Forced
from cost_models import Cluster

torch.set_num_threads(1)


@pytest.mark.parametrize("number", [0, 1, 2, 14, 26, 27, 28, 29])
def test_no_plan_of_a_small_graph_is_better(number: int) -> None:
    found = exhaustive.compare(number)
    assert found.ratio <= 1 + exhaustive.EQUAL, found


def test_what_a_stage_takes_at_least_is_no_more_than_it_takes() -> None:
    """Under a budget that some stages fit with other solutions than their fastest ones."""
    instance = exhaustive.random_instance(12)
    workload = ModelWorkload(GraphFamily(instance.model, instance.batch), instance.counts)
    forced = Forced(workload, instance.cluster, 34e6, folded=False)
    count, fits = instance.counts[0], []
    layers = forced.program(count).num_layers
    submeshes, views = allowed_views(instance.cluster, SearchOptions(), layers)
    shapes = exhaustive._shapes(submeshes, instance.cluster.num_devices, layers, [count])
    for shape in (shape for shape in shapes if not shape.takes_turns):
        for index, submesh in enumerate(shape.submeshes):
            for choice in exhaustive._choices(forced, shape, index, views[submesh]):
                told = choice.told, choice.position, choice.view, count, choice.flight
                free = forced.solve(*told, within_budget=False)
                found = forced.solve(*told)
                if found is not None and free is not None:
                    p = found.prediction
                    least_s = count * (p.forward_s + p.backward_s) + p.step_s
                    assert choice.least_s <= least_s * (1 + 1e-9)
                    fits.append(found.seconds > free.seconds * (1 + 1e-6))
    assert any(fits) and not all(fits)


@pytest.mark.parametrize(
    "case",
    [
        handmade.Case("gpt", "gpt:128:2:2:32", "h100:1x2", 2, "model"),
        handmade.Case("moe", "moe:128:2:2:32:4", "v100:2x1", 2, "model"),
    ],
    ids=lambda case: case.name,
)
def test_no_hand_made_plan_is_better(case: handmade.Case) -> None:
    found = handmade.compare(case)
    assert found.points > 1 and found.ratio <= 1 + 1e-6, found


def six_blocks() -> tuple[torch.nn.Module, object]:
    return handmade.model_of("gpt:128:6:2:32", 8)


def test_folding_loses_nothing() -> None:
    found = folded.compare(folded.Case(f"{__name__}:six_blocks", "4", 0.3))
    free = found.pairs[0]
    assert found.folds == (4,) and free.unfolded is not None
    assert 1 - folded.NO_GAP <= free.at_most <= 1 + 2 * folded.NO_GAP, free


def test_levels_of_zero_are_what_they_are_called() -> None:
    """Of a data parallel plan: replicated; sharded at rest; gradients too; in the step too. More
    sharding never takes more bytes, and the mixture of all is at least as fast as each."""
    model, batch = handmade.model_of("gpt:128:2:2:32", 8)
    workload = ModelWorkload(GraphFamily(model, batch), (2,))
    forced = Forced(workload, Cluster.parse("h100:1x4"), 80e9, folded=True)
    told = forced.cut(2, (0,), (Remat.NONE,) * 4)
    view = handmade.Submesh(1, 4).view((4,))
    found = {}
    for zero in (*handmade.ZERO, handmade.ANY):
        solution = forced.solve(told, 0, view, 2, 1, handmade.on_data_axis(zero), zero)
        assert solution is not None
        found[zero] = solution
    matrices = [
        name
        for name in found["0"].parameters
        if name.endswith("weight") and "norm" not in name and "head" not in name
    ]

    def sharded(zero: str, part: str) -> set[bool]:
        return {getattr(found[zero].parameters[name], part)[0] >= 0 for name in matrices}

    assert [sharded(z, "rest") for z in handmade.ZERO] == [{False}, {True}, {True}, {True}]
    assert [sharded(z, "step") for z in handmade.ZERO] == [{False}, {False}, {False}, {True}]
    standing = [
        found[z].prediction.peak_bytes - found[z].prediction.transient_bytes for z in handmade.ZERO
    ]
    assert standing[1] > standing[2] > standing[3]
    assert found[handmade.ANY].seconds <= min(s.seconds for s in found.values()) * (1 + 1e-9)
    assert all(layout[0] >= 0 for layout in (found["0"].inputs[n] for n in ("batch_0", "batch_1")))


def test_what_a_grid_takes_at_least() -> None:
    """Four blocks of a second in two stages of two devices, four microbatches: 1 s each stage and
    microbatch, and one more before the last stage begins."""
    names = ("first", "a.0", "a.1", "a.2", "a.3", "last")
    grid = handmade.Grid(2, 1, 2, 4, Remat.NONE)
    assert handmade.equal_split(names, 2) == (0, 3)
    assert handmade.least_s((0.0, 1.0, 1.0, 1.0, 1.0, 0.0), names, grid) == pytest.approx(5.0)
