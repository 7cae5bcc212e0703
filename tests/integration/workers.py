"""What each process of the integration tests runs; importable by spawned processes."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.plan import ParallelPlan
from autopar.runtime.comm import World
from autopar.runtime.module import ParallelModel
from tests.plans import random_plan
from tests.unit.runtime.reference import Case, zoo_case

SEED, RATE = 11, 1e-3


def make_case(name: str, seed: int) -> tuple[Case, ParallelPlan]:
    """The same on every rank: two stages of two devices, two microbatches, float64."""
    case = zoo_case(name)
    return case, random_plan(case.graph, [(2,), (2,)], random.Random(seed))


def parallel(world: World, name: str, seed: int) -> tuple[Case, ParallelModel]:
    case, plan = make_case(name, seed)
    return case, ParallelModel(case.model, case.graph, plan, world=world)


def wholes(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors; every rank of the stage must call this."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in named.items()
    }


def train(world: World, name: str, seed: int) -> dict[str, Any]:
    """One step, clipped gradients, AdamW; then a second step on the rows of data_shard alone."""
    case, model = parallel(world, name, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loss = model.train_step(case.batch, seed=SEED)
    gradients = wholes({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    norm = model.clip_grad_norm_(0.1)
    clipped = wholes({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    maximum = model.clip_grad_norm_(1e9, float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    parameters = wholes(dict(model.named_parameters()))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    evaluated = model.eval_step(case.batch)
    second = model.train_step(model.data_shard.select(case.batch), seed=SEED + 1)
    again = model.train_step(case.batch, seed=SEED + 1)
    doubled = wholes({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return {
        "loss": loss,
        "gradients": gradients,
        "norm": norm,
        "clipped": clipped,
        "maximum": maximum,
        "parameters": parameters,
        "buffers": buffers,
        "evaluated": evaluated,
        "second": second,
        "again": again,
        "doubled": doubled,
        "rows": model.data_shard.rows,
        "names": list(model.state_dict()),
    }
