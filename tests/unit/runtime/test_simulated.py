"""The virtual run of random plans computes what the captured graph computes whole."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from autopar.errors import BatchError, ScheduleError
from autopar.lowering.lower import LoweredPlan, lower_plan
from autopar.plan import Remat
from autopar.runtime.simulated import VirtualRun
from autopar.schedule import Schedule, ScheduleKind
from tests.plans import random_plan
from tests.uneven import UNEVEN
from tests.unit.runtime.reference import Case, Expected, expected_step, worst_error, zoo_case
from tests.zoo import CORE

SEED, TOLERANCE = 7, 1e-8
GPIPE, ONE_F_ONE_B = ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B
INTERLEAVED, ZB_H1 = ScheduleKind.INTERLEAVED, ScheduleKind.ZB_H1
PLANS = {
    "2x2": ([(2, 2)], Remat.SELECTIVE, GPIPE),
    "2+2": ([(2,), (2,)], Remat.FULL, ONE_F_ONE_B),
    "1+1+1+1 gpipe": ([(1,)] * 4, Remat.NONE, GPIPE),
    "1+1+1+1 1f1b": ([(1,)] * 4, Remat.SELECTIVE, ONE_F_ONE_B),
}


# Several stages per worker, and backward in two: (model, meshes, workers, recompute, schedule).
# T5 sends to several later stages, also to one on the same devices; GPT-2 ties its embedding to its
# head; both drop out. In wide_resnet every stage updates buffers.
SPLIT_PLANS = {
    "gpt2 interleaved": ("gpt2", [(2,), (1,), (2,), (1,)], 2, Remat.NONE, INTERLEAVED),
    "t5 interleaved": ("t5", [(1,)] * 4, 2, Remat.FULL, INTERLEAVED),
    "wide_resnet interleaved": ("wide_resnet", [(1,)] * 4, 2, Remat.SELECTIVE, INTERLEAVED),
    "gpt2 zb-h1": ("gpt2", [(2,), (1,), (1,)], None, Remat.FULL, ZB_H1),
    "t5 zb-h1": ("t5", [(1,), (2,), (1,)], None, Remat.SELECTIVE, ZB_H1),
    "wide_resnet zb-h1": ("wide_resnet", [(1,), (2,)], None, Remat.NONE, ZB_H1),
}


@cache
def _case(name: str) -> tuple[Case, Expected]:
    torch.set_num_threads(1)
    case = zoo_case(name)
    return case, expected_step(case, seed=SEED)


def _lowered(case: Case, plan: str, seed: int = 0) -> LoweredPlan:
    meshes, remat, schedule = PLANS[plan]
    rng = random.Random(seed)
    return lower_plan(
        case.graph, random_plan(case.graph, meshes, rng, remat=remat, schedule=schedule)
    )


def _run(case: Case, lowered: LoweredPlan) -> VirtualRun:
    return VirtualRun(lowered, case.graph, case.parameters, case.buffers)


@pytest.mark.parametrize(("name", "plan"), [*product(CORE, PLANS), *product(UNEVEN, ("2+2",))])
def test_step_equals_the_graph_on_every_microbatch(name: str, plan: str) -> None:
    case, want = _case(name)
    run = _run(case, _lowered(case, plan))
    got = run.step(case.leaves, SEED)
    assert abs(float(got.loss - want.loss)) <= TOLERANCE * abs(float(want.loss))
    error, worst = worst_error(got.gradients, want.gradients)
    assert error <= TOLERANCE, worst
    read = {name: want.buffers[name] for name in got.buffers}
    error, worst = worst_error(got.buffers, read)
    assert error <= TOLERANCE, worst


@pytest.mark.parametrize("plan", SPLIT_PLANS)
def test_shared_devices_and_split_backward_equal_the_graph(plan: str) -> None:
    name, meshes, workers, remat, schedule = SPLIT_PLANS[plan]
    case, want = _case(name)
    rng = random.Random(3)
    made = random_plan(case.graph, meshes, rng, remat=remat, schedule=schedule, num_workers=workers)
    lowered = lower_plan(case.graph, made)
    split = [stage.weights is not None for stage in lowered.stages]
    assert split == [schedule is ZB_H1] * len(meshes)
    got = _run(case, lowered).step(case.leaves, SEED)
    assert abs(float(got.loss - want.loss)) <= 1e-10 * abs(float(want.loss))
    error, worst = worst_error(got.gradients, want.gradients)
    assert error <= 1e-10, worst
    read = {name: want.buffers[name] for name in got.buffers}
    error, worst = worst_error(got.buffers, read)
    assert error <= 1e-10, worst


def test_optimizer_on_shards_equals_optimizer_on_wholes() -> None:
    case, _ = _case("gpt2")
    run = _run(case, _lowered(case, "2+2"))
    run.attach(lambda shards: torch.optim.AdamW(shards, lr=1e-3))
    wholes = {n: torch.nn.Parameter(p.clone()) for n, p in case.parameters.items()}
    reference = torch.optim.AdamW(wholes.values(), lr=1e-3)
    for step in range(2):
        held = {name: p.detach() for name, p in wholes.items()}
        want = expected_step(case, seed=step, parameters=held)
        got = run.step(case.leaves, step)
        assert torch.allclose(got.loss, want.loss, rtol=1e-10)
        run.update()
        for name, parameter in wholes.items():
            parameter.grad = want.gradients[name]
        reference.step()
    # Adam divides by the gradient's size: where that is zero but for rounding, so is the update
    error, worst = worst_error(run.parameters(), {n: p.detach() for n, p in wholes.items()})
    assert error <= 1e-6, worst


def test_evaluation_updates_nothing_and_gives_the_loss() -> None:
    case, want = _case("wide_resnet")
    run = _run(case, _lowered(case, "2x2"))
    loss = run.eval_step(case.leaves, SEED)
    assert torch.allclose(loss, want.loss, rtol=1e-10)
    assert worst_error(run.buffers(), case.buffers)[0] == 0.0


def test_seeds_differ_between_steps() -> None:
    case, want = _case("gpt2")
    other = _run(case, _lowered(case, "1+1+1+1 1f1b")).step(case.leaves, SEED + 1)
    assert float(other.loss) != float(want.loss)


def test_deadlock_is_an_error_that_names_the_waiting_stages() -> None:
    case, _ = _case("gpt2")
    lowered = _lowered(case, "2+2")
    rows = "stage0: F0 B0 F1 B1 R\nstage1: F0 F1 B0 B1 R"
    broken = replace(lowered, schedule=Schedule.parse(rows, kind=GPIPE))
    with pytest.raises(ScheduleError, match="stage0 at B0, stage1 at F1"):
        _run(case, broken).step(case.leaves, SEED)


def test_a_batch_of_another_size_is_refused() -> None:
    case, _ = _case("gpt2")
    run = _run(case, _lowered(case, "2x2"))
    with pytest.raises(BatchError, match=r"\[6, 16\].*expected int64\[8, 16\]"):
        run.step(tuple(leaf[:6] for leaf in case.leaves), SEED)
