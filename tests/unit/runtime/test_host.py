"""Parameters that rest on the host: the same step, and where things are."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import torch

from autopar.compile.trace import is_traceable
from autopar.graph.precision import Precision
from autopar.graph.program import Ref
from autopar.lowering.lower import LoweredPlan, lower_plan
from autopar.lowering.program import Compute
from autopar.runtime.module import ParallelModel
from autopar.runtime.simulated import VirtualRun
from tests.plans import random_plan
from tests.unit.runtime.reference import Case, expected_step, worst_error, zoo_case

SEED = 5


@cache
def _case(precision: str = "model") -> Case:
    double = precision == "model"
    return zoo_case("gpt2", double=double, precision=Precision.parse(precision))


def _lowered(case: Case, meshes: list[tuple[int, ...]], *, offload: bool = True) -> LoweredPlan:
    """gpt2's tied embedding is on the host of the first stage, which lends it to the last."""
    plan = random_plan(case.graph, meshes, random.Random(1), offload=offload)
    return lower_plan(case.graph, plan)


def test_two_steps_equal_those_of_one_device() -> None:
    case = _case()
    run = VirtualRun(_lowered(case, [(2,), (2,)]), case.graph, case.parameters, case.buffers)
    run.attach(lambda shards: torch.optim.AdamW(shards, lr=1e-3, eps=1e-4))
    wholes = {n: torch.nn.Parameter(p.clone()) for n, p in case.parameters.items()}
    reference = torch.optim.AdamW(wholes.values(), lr=1e-3, eps=1e-4)
    for step in range(2):
        held = {name: p.detach() for name, p in wholes.items()}
        want = expected_step(case, seed=step, parameters=held)
        got = run.step(case.leaves, step)
        assert torch.allclose(got.loss, want.loss, rtol=1e-10)
        error, worst = worst_error(got.gradients, want.gradients)
        assert error <= 1e-9, worst
        run.update()
        for name, parameter in wholes.items():
            parameter.grad = want.gradients[name]
        reference.step()
    error, worst = worst_error(run.parameters(), {n: p.detach() for n, p in wholes.items()})
    assert error <= 1e-9, worst


def test_the_way_to_the_host_changes_no_bit() -> None:
    case = _case("bf16")
    steps = [
        VirtualRun(
            _lowered(case, [(2,)], offload=offload), case.graph, case.parameters, case.buffers
        ).step(case.leaves, SEED)
        for offload in (False, True)
    ]
    assert torch.equal(steps[0].loss, steps[1].loss)
    for name, gradient in steps[0].gradients.items():
        assert torch.equal(gradient, steps[1].gradients[name]), name


def test_each_shard_is_cast_before_the_next_one_comes() -> None:
    (stage,) = _lowered(_case("bf16"), [(2,)]).stages
    copies = [i.kwargs for i in stage.gather.body if isinstance(i, Compute) and i.kwargs]
    loads = [number for number, kwargs in enumerate(copies) if "device" in kwargs]
    assert len(loads) == sum(p.host and p.source == p.name for p in stage.parameters) > 5
    assert all("dtype" in copies[number + 1] for number in loads)


def test_what_comes_from_the_host_is_not_compiled() -> None:
    """A copy of the model's own is, whatever it waits for."""
    (stage,) = _lowered(_case(), [(2,)]).stages
    assert not is_traceable(stage.gather) and is_traceable(stage.forward)
    copy = torch.ops.aten._to_copy.default
    *before, last = stage.forward.body
    own = Compute("own", copy, (Ref(before[-1].name),), {"non_blocking": True})
    assert is_traceable(replace(stage.forward, body=(*before, own, last)))


def test_a_state_dict_comes_back() -> None:
    case = _case()
    plan = random_plan(case.graph, [(1,)], random.Random(0), offload=True)
    model, other = (ParallelModel(case.model, case.graph, plan) for _ in range(2))
    loss = model.train_step(case.batch, seed=SEED)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    other.load_state_dict(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(model.eval_step(case.batch), other.eval_step(case.batch))
    assert not torch.equal(model.train_step(case.batch, seed=SEED), loss)
