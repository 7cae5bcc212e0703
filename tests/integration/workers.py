"""What each process of the integration tests runs; importable by spawned processes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.graph.precision import Precision
from autopar.plan import ParallelPlan
from autopar.runtime.comm import World
from autopar.runtime.module import ParallelModel
from autopar.schedule import ScheduleKind
from tests.plans import random_plan, with_strategy
from tests.unit.runtime.reference import Case, zoo_case

SEED, RATE, MAX_NORM = 11, 1e-3, 0.1
ON_HOSTS = " on hosts"  # ends the name of a case in which every second parameter rests there


def make_case(
    name: str, meshes: Sequence[tuple[int, ...]] = ((2,), (2,))
) -> tuple[Case, ParallelPlan]:
    """The same on every rank: two microbatches, float64, by default two stages of two devices."""
    case = zoo_case(name.removesuffix(ON_HOSTS))
    offload = name.endswith(ON_HOSTS)
    return case, random_plan(case.graph, meshes, random.Random(0), offload=offload)


def parallel(world: World, name: str) -> tuple[Case, ParallelModel]:
    case, plan = make_case(name)
    return case, ParallelModel(case.model, case.graph, plan, world=world)


def wholes(named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Whole tensors; every rank of the stage must call this."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in named.items()
        if t is not None
    }


def gradients(model: ParallelModel) -> dict[str, Tensor]:
    return wholes({name: p.grad for name, p in model.named_parameters()})


def train_all(world: World, names: Sequence[str], folder: str) -> dict[str, dict[str, Any]]:
    """One start of processes for all models."""
    return {name: train(world, name, f"{folder}/{name}") for name in names}


def train(world: World, name: str, folder: str) -> dict[str, Any]:
    """A clipped AdamW step, a checkpoint written and read; then a step on the rows of data_shard,
    and again on the whole batch."""
    case, model = parallel(world, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    record: dict[str, Any] = {"names": list(model.state_dict())}
    record["loss"] = model.train_step(case.batch, seed=SEED)
    record["gradients"] = gradients(model)
    record["norm"] = model.clip_grad_norm_(MAX_NORM)
    record["clipped"] = gradients(model)
    record["maximum"] = model.clip_grad_norm_(1e9, float("inf"))
    record["buffers"] = wholes(dict(model.named_buffers()))
    optimizer.step()
    optimizer.zero_grad()
    record["parameters"] = wholes(dict(model.named_parameters()))
    _check_checkpoint(model, folder)
    evaluated = model.eval_step(case.batch)
    assert bool(evaluated.isfinite())
    record["second"] = model.train_step(model.data_shard.select(case.batch), seed=SEED + 1)
    again = model.train_step(case.batch, seed=SEED + 1)
    assert torch.equal(again, record["second"])
    record["doubled"] = gradients(model)
    return record


def _check_checkpoint(model: ParallelModel, folder: str) -> None:
    """Save, spoil, load: parameters under all their names, and buffers."""
    saved = wholes(model.state_dict())
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    for key, tensor in wholes(model.state_dict()).items():
        assert torch.equal(tensor, saved[key]), key


@cache
def cached_case(name: str) -> Case:
    """In float64, captured once per process."""
    return zoo_case(name)


def random_case(
    name: str,
    meshes: Sequence[tuple[int, ...]],
    precision: str = "",
    strategies: Mapping[str, str] | None = None,
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B,
    num_workers: int | None = None,
) -> tuple[Case, ParallelPlan]:
    """A random plan on these meshes, but for the strategies of operators whose names begin so. In
    float64, or in a precision. num_workers: groups of devices, if stages share them."""
    kind = Precision.parse(precision or "model")
    case = cached_case(name) if not precision else zoo_case(name, double=False, precision=kind)
    plan = random_plan(
        case.graph, meshes, random.Random(0), schedule=schedule, num_workers=num_workers
    )
    for operator, text in (strategies or {}).items():
        plan = with_strategy(plan, operator, text)
    return case, plan


def step_of(world: World, *which: Any) -> dict[str, Any]:
    """One step of a `random_case`; results on the CPU."""
    case, plan = random_case(*which)
    model = ParallelModel(case.model, case.graph, plan, world=world)
    loss = model.train_step(case.batch, seed=SEED)
    return {"loss": loss.cpu(), "gradients": _on_cpu(gradients(model))}


def steps_of(world: World, cases: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """`step_of` for several cases: one start of processes for all of them."""
    return [step_of(world, *which) for which in cases]


def on_hosts(world: World | None, meshes: Sequence[tuple[int, ...]], folder: str) -> dict[str, Any]:
    """A clipped, fused AdamW step on CUDA with parameters on hosts, and where everything is.

    Without a world in this process. Results on the CPU.
    """
    case, plan = make_case("gpt2" + ON_HOSTS, meshes)
    device = torch.device("cuda", 0) if world is None else world.device
    model = ParallelModel(case.model, case.graph, plan, world=world, device=device)
    there = {
        path
        for stage in model.lowered.stages
        for p in stage.parameters
        for path in (p.path, p.owner)
        if p.host
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    loss = model.train_step(case.batch, seed=SEED)
    record = {"loss": loss.cpu(), "gradients": _on_cpu(gradients(model))}
    record["norm"] = model.clip_grad_norm_(MAX_NORM).cpu()
    optimizer.step()
    for name, parameter in model.named_parameters():
        held = [parameter, parameter.grad, *optimizer.state[parameter].values()]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in held if t is not None]
        kinds = {t.device.type for t in local}
        assert kinds == {"cpu" if name in there else "cuda"}, (name, kinds)
        assert local[0].is_pinned() == (name in there), name
    record["on_host"] = sorted(there & dict(model.named_parameters()).keys())
    record["parameters"] = _on_cpu(wholes(dict(model.named_parameters())))
    optimizer.zero_grad()
    if world is not None:
        _check_checkpoint(model, folder)
    record["second"] = model.train_step(case.batch, seed=SEED + 1).cpu()
    return record


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
