"""The search: deterministic, within its pins and limits, consistent with its own figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar.candidate import budgets, place_stages
from autopar.errors import MeshError, NoFeasiblePlan, OptionError
from autopar.graph.program import Graph
from autopar.mesh import Submesh, submeshes
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import make_plan
from autopar.schedule import ScheduleKind, build_schedule, in_flight
from cost_models import Cluster
from tests.unit.intraop.stages import gpt2_graph, graph_of

ROOT = Path(__file__).parents[2]


def tiny() -> Graph:
    return gpt2_graph(4, 16, 3, n_embd=32, n_head=4, n_positions=16, vocab_size=64)


def planned(cluster: str = "h100:1x4", microbatches: int = 4, **options: Any) -> ParallelPlan:
    budget = options.pop("budget_bytes", None)
    return make_plan(
        tiny(),
        Cluster.parse(cluster),
        num_microbatches=microbatches,
        budget_bytes=budget,
        options=SearchOptions(cache=False, **options),
    )


def decisions(plan: ParallelPlan) -> str:
    """Everything but how long the search took."""
    record = replace(plan, search=replace(plan.search, seconds={})).to_json()
    return json.dumps(record, sort_keys=True)


def test_the_same_plan_every_time_and_everywhere() -> None:
    here = decisions(planned())
    assert decisions(planned()) == here
    code = "from tests.unit.test_planner import *; print(decisions(planned()))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "12345", "PATH": "", "HOME": "/tmp"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == here


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_pinned_stages(num_stages: int) -> None:
    plan = planned(num_stages=num_stages, schedule=ScheduleKind.ONE_F_ONE_B)
    assert len(plan.stages) == num_stages and plan.num_devices == 4
    flights = in_flight(build_schedule(plan.schedule, num_stages, 4))
    assert tuple(s.prediction.in_flight for s in plan.stages) == flights


@pytest.mark.parametrize("shape", [(4,), (2, 2), (2,), (1,)], ids=str)
def test_pinned_mesh(shape: tuple[int, ...]) -> None:
    assert {s.axis_sizes for s in planned(mesh_shape=shape).stages} == {shape}


def test_pinned_views_know_their_slow_axes() -> None:
    (stage,) = planned("h100:2x4", mesh_shape=(2, 4)).stages
    assert stage.crosses_nodes == (True, False)
    (stage,) = planned("h100:4x2", mesh_shape=(2, 4)).stages
    assert stage.crosses_nodes == (True, True)


@pytest.mark.parametrize("remat", Remat)
def test_pinned_remat(remat: Remat) -> None:
    assert set(planned(num_stages=1, remat=remat).remat) == {remat}


def test_pinned_placements() -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    for stages in (1, 2):
        plan = planned(num_stages=stages, mesh_shape=(4 // stages,), placements={name: "S1"})
        placed = [
            p.rest
            for stage in plan.stages
            for key, p in stage.parameters.items()
            if key.endswith("h_1_mlp_c_fc_weight")
        ]
        assert placed == ["S1"]


def test_a_pin_decides_between_views() -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    assert planned(num_stages=1, placements={name: "S0 S1"}).stages[0].axis_sizes == (2, 2)
    assert planned(num_stages=1, placements={name: "S0"}).stages[0].axis_sizes == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 5}, "num_stages is at most 4"),
        ({"mesh_shape": (3,)}, "no submesh"),
        ({"placements": {"transformer.h.1.mlp.c_fc.weigh": "S0"}}, "did you mean.*c_fc.weight"),
        (
            {"placements": {"transformer.h.1.mlp.c_fc.weight": "S7"}, "num_stages": 1},
            "c_fc.weight.*'S7'.*it can be",
        ),
    ],
    ids=str,
)
def test_pins_that_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        planned(**options)


def test_stages_are_more_than_devices() -> None:
    with pytest.raises(OptionError, match="1 devices"):
        planned("h100:1x1", num_stages=2)


def test_one_device() -> None:
    plan = planned("h100:1x1", 1)
    (stage,) = plan.stages
    assert stage.devices == (0,) and stage.axis_sizes == (1,)
    p = stage.prediction
    assert plan.step_s == pytest.approx(p.forward_s + p.backward_s + p.step_s)


def test_the_step_is_that_of_the_stages() -> None:
    (stage,) = (plan := planned(num_stages=1, microbatches=3)).stages
    p = stage.prediction
    assert plan.step_s == pytest.approx(3 * (p.forward_s + p.backward_s) + p.step_s)
    assert plan.search.objective_s == pytest.approx(plan.step_s)


def test_nothing_fits_a_megabyte() -> None:
    with pytest.raises(NoFeasiblePlan, match="GiB") as error:
        planned(num_stages=1, budget_bytes=1e4)
    assert error.value.least_bytes is None or error.value.least_bytes > 1e4


def test_remat_escalates_when_memory_is_tight() -> None:
    free = planned(num_stages=1, microbatches=1)
    assert set(free.remat) == {Remat.NONE}
    full = planned(num_stages=1, microbatches=1, remat=Remat.FULL).stages[0].prediction
    budget = 1.02 * full.peak_bytes
    assert budget < free.stages[0].prediction.peak_bytes
    tight = planned(num_stages=1, microbatches=1, budget_bytes=budget, time_limit_s=6.0)
    assert tight.stages[0].prediction.peak_bytes <= budget
    assert set(tight.remat) != {Remat.NONE}


def test_tight_memory_takes_the_fastest_policy() -> None:
    """Not the first that fits: to recompute may cost less than to shard what is saved."""

    def at(remat: Remat | None, budget: float | None = None) -> ParallelPlan:
        pins = {"num_stages": 1, "mesh_shape": (4,), "remat": remat, "time_limit_s": 20.0}
        return planned(microbatches=1, budget_bytes=budget, **pins)

    free, full = (at(r).stages[0].prediction.peak_bytes for r in (Remat.NONE, Remat.FULL))
    budget = (free + full) / 2
    recomputing = [at(remat, budget) for remat in (Remat.SELECTIVE, Remat.FULL)]
    joint = at(None, budget)
    assert joint.step_s <= min(plan.step_s for plan in recomputing) * (1 + 1e-9)


def test_stages_lie_inside_nodes() -> None:
    cluster = Cluster.parse("h100:2x8")
    cuts = [
        (Submesh(1, 2), Submesh(1, 8), Submesh(1, 4), Submesh(1, 1), Submesh(1, 1)),
        (Submesh(1, 1),) * 8 + (Submesh(1, 8),),
        (Submesh(2, 8),),
        (Submesh(1, 4), Submesh(1, 2), Submesh(1, 4), Submesh(1, 2), Submesh(1, 4)),
    ]
    for cut in cuts:
        placed = place_stages(cut, cluster)
        assert sorted(rank for ranks in placed for rank in ranks) == list(range(16))
        for submesh, ranks in zip(cut, placed, strict=True):
            assert len({rank // 8 for rank in ranks}) == submesh.num_nodes
    with pytest.raises(MeshError, match="use 2 of the 16 devices of h100:2x8"):
        place_stages((Submesh(1, 2),), cluster)
    assert all(s.num_devices <= 16 for s in submeshes(cluster))


def test_stages_lie_on_the_devices_of_their_group() -> None:
    cluster = Cluster.parse("h100:1x4+a100:2x2")
    stages = (Submesh(1, 1, 1), Submesh(1, 2), Submesh(1, 2), Submesh(1, 2, 1), Submesh(1, 1, 1))
    assert place_stages(stages, cluster) == ((6,), (0, 1), (2, 3), (4, 5), (7,))
    with pytest.raises(MeshError, match="use 0 of the 4 devices of a100:2x2"):
        place_stages((Submesh(1, 4),), cluster)
    h100, a100 = (group.device.memory_bytes for group in cluster.groups)
    assert budgets(cluster, 0.5) == (h100 / 2, a100 / 2)


def test_a_graph_without_layers_gets_them() -> None:
    bare = replace(graph_of("mlp"), layer_names=())
    assert make_plan(bare, Cluster.parse("h100:1x2")).layer_names
