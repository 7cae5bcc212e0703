"""Parameters on the hosts where nothing else fits: what the search then finds, and that it is
right."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from autopar.errors import NoFeasiblePlan, OptionError
from autopar.explain import ONCE_PER_STEP, Kind, explained_stages, ledger
from autopar.intraop.build import build_problem
from autopar.intraop.stage import solve_stage
from autopar.intraop.stage_problem import StageContext
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.planner import make_plan
from autopar.report.text import plan_text
from autopar.verify import verify_plan
from cost_models import Cluster
from tests.golden.update import Mlp
from tests.unit.intraop.measured import peak_bytes
from tests.unit.intraop.stages import costs_of, graph_of, stage_of

NUM_MICROBATCHES = 2


def planned(budget: float | None, cluster: str = "h100:1x2", **options: Any) -> ParallelPlan:
    return make_plan(
        graph_of("mlp"),
        Cluster.parse(cluster),
        num_microbatches=NUM_MICROBATCHES,
        budget_bytes=budget,
        options=SearchOptions(cache=False, time_limit_s=10.0, **options),
    )


@cache
def least_bytes() -> float:
    """Below it nothing fits without offload."""
    with pytest.raises(NoFeasiblePlan) as error:
        planned(1e3, offload=False)
    assert error.value.least_bytes is not None
    return error.value.least_bytes


def num_on_host(plan: ParallelPlan) -> int:
    return sum(p.host for stage in plan.stages for p in stage.parameters.values())


@cache
def offloaded() -> ParallelPlan:
    return planned(0.95 * least_bytes())


def test_parameters_rest_on_hosts_where_nothing_else_fits() -> None:
    plan = offloaded()
    assert 1 <= num_on_host(plan) < len(plan.stages[0].parameters)
    assert max(s.prediction.peak_bytes for s in plan.stages) <= 0.95 * least_bytes()
    assert all(s.prediction.host_bytes > 0 for s in plan.stages)
    assert "nothing fits without parameters on the hosts" in plan.search.notes
    assert "S1 host" in plan_text(plan) and "on the host 128 KiB" in plan_text(plan)
    more = planned(0.8 * least_bytes())
    assert num_on_host(more) > num_on_host(plan) and more.step_s > plan.step_s


def test_it_can_be_forbidden_allowed_and_unknown() -> None:
    with pytest.raises(NoFeasiblePlan):
        planned(0.95 * least_bytes(), offload=False)
    with pytest.raises(NoFeasiblePlan):
        planned(0.95 * least_bytes(), "cpu:1x2")
    assert num_on_host(planned(None, offload=True)) == 0  # it costs, and there is room
    with pytest.raises(OptionError, match="host_bandwidth_bytes_per_s"):
        planned(None, "cpu:1x2", offload=True)


def test_under_every_budget_the_choice_is_that_of_brute_force() -> None:
    """On one device what is left to choose is which of the two weights are on the host."""
    stage, costs, context = stage_of("mlp"), costs_of((1,)), StageContext(offload=True)
    problem = build_problem(stage.graph, stage.table, costs, context).problem
    every = [*itertools.product(*(range(len(seconds)) for seconds in problem.node_seconds))]
    assert len(every) == 4
    for nbytes in {problem.bytes(choice) for choice in every}:
        best = min(problem.seconds(c) for c in every if problem.bytes(c) <= nbytes)
        free = solve_stage(stage.graph, stage.table, costs, context, budget_bytes=None)
        budget = nbytes + free.prediction.transient_bytes
        found = solve_stage(stage.graph, stage.table, costs, context, budget_bytes=budget)
        assert found.seconds == pytest.approx(best)


def test_it_is_explained() -> None:
    plan = offloaded()
    for stage in explained_stages(graph_of("mlp"), plan):
        spent, p = ledger(stage), stage.plan.prediction
        assert sum(spent[k] for k in ONCE_PER_STEP) == pytest.approx(p.step_s)
        assert spent[Kind.STEP_GATHER] == pytest.approx(p.gather_s)
        assert spent[Kind.STEP_REDUCE] == pytest.approx(p.reduce_s)
        assert spent[Kind.STEP_REDUCE] > 0


def test_the_step_is_that_of_one_device() -> None:
    torch.manual_seed(0)
    model, batch = Mlp(64, 256), (torch.randn(128 * NUM_MICROBATCHES, 64),)
    report = verify_plan(model, batch, offloaded(), dtype="float64")
    assert report.ok, report.errors


def test_the_prediction_is_what_a_rank_holds() -> None:
    """On the CPU gradients that go to the host are counted too, at the end of the step."""
    plan = offloaded()
    prediction = plan.stages[0].prediction
    batch = torch.ones(128 * NUM_MICROBATCHES, 64)
    held = peak_bytes(graph_of("mlp"), plan, [batch])
    assert 0.97 <= (prediction.peak_bytes - prediction.optimizer_bytes) / held <= 1.5
