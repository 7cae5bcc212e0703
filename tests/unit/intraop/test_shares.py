"""Shares of a stage's prediction, against what a step really holds and what the parts add up to."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.actions import Action
from autopar.api import plan_model
from autopar.graph.program import Graph
from autopar.lowering.lower import lower_plan
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.runtime.executor import StagePlayer
from autopar.runtime.simulated import VirtualRun
from autopar.schedule import ScheduleKind
from cost_models import Cluster
from tests.zoo import ZOO


@cache
def planned() -> tuple[ParallelPlan, Graph]:
    model, batch = ZOO["gpt2"]()
    options = SearchOptions(
        num_stages=2, num_microbatches=2, schedule=ScheduleKind.ZB_H1, remat=Remat.FULL
    )
    return plan_model(model, batch, Cluster.parse("cpu:1x4"), options=options)


def test_weight_bytes_are_what_a_microbatch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages that live from B to W on rank 0 of each stage, to the byte."""
    held: dict[int, int] = {}
    right = StagePlayer._backward

    def measured(self: StagePlayer, action: Action, microbatch: int) -> None:
        right(self, action, microbatch)
        values = self._state.held[microbatch].values()
        storages = [shards[0].untyped_storage() for shards in values]
        sizes = {s.data_ptr(): s.nbytes() for s in storages}
        held[self._executor.stage.index] = sum(sizes.values())

    monkeypatch.setattr(StagePlayer, "_backward", measured)
    plan, graph = planned()
    model, batch = ZOO["gpt2"]()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    run = VirtualRun(lower_plan(graph, plan), graph, parameters, dict(model.named_buffers()))
    run.step(graph.batch_spec.tensors(batch), 0)
    assert held == {i: stage.prediction.weight_bytes for i, stage in enumerate(plan.stages)}
    assert held[1] > plan.stages[1].prediction.saved_bytes  # what was recomputed waits for W too


def test_shares_are_parts_of_what_is_predicted() -> None:
    plan, _ = planned()
    first, last = (stage.prediction for stage in plan.stages)
    assert first.weight_s == first.backward_s  # nothing is sent back: all of backward waits
    assert 0 < last.weight_s < 0.5 * last.backward_s
    for p in (first, last):
        assert p.gather_s >= 0 and p.reduce_s >= 0
        assert p.gather_s + p.reduce_s < p.step_s
    assert last.gather_s > 0  # the tied embedding, borrowed from the first stage
