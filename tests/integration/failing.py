"""What the processes run in the tests of failure: a small model, so that they start quickly."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import PlanError
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.runtime.comm import World
from autopar.runtime.module import ParallelModel
from tests.plans import random_plan

PULLED = "the plug was pulled"


def small(world: World) -> tuple[ParallelModel, torch.Tensor]:
    """Two stages of two ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batch = torch.randn(8, 8)
    graph = capture_graph(model, batch[:4], lambda outputs, _: outputs.square().mean())
    graph = cluster_layers(graph, 2)
    plan = random_plan(graph, [(2,), (2,)], random.Random(0))
    return ParallelModel(model, graph, plan, world=world), batch


def fail_mid_step(world: World, failing: int, kind: str, clock: str) -> None:
    """One good step, then one in which a rank fails as it receives; it writes down when."""
    model, batch = small(world)
    model.train_step(batch)
    if world.rank == failing:

        def receive(_transfers: Any, _action: Any) -> Any:
            Path(clock).write_text(str(time.time()), encoding="utf-8")
            if kind == "die":
                os._exit(7)
            raise ValueError(PULLED)

        (executor,) = model._executors.values()
        executor.transport.receive = receive  # type: ignore[method-assign]
    model.train_step(batch)


class User:
    """Of groups, who writes down when he is released."""

    def __init__(self, released: list[int], number: int) -> None:
        self._released, self._number = released, number

    def release(self) -> None:
        self._released.append(self._number)


def released(world: World) -> list[int]:
    """In which order three users are, when the second of them is gone."""
    found: list[int] = []
    users = [User(found, number) for number in range(3)]
    for user in users:
        world.release_first(user)
    del user, users[1]
    world.close()
    return found


def exchange(world: World) -> Any:
    """Objects, barriers, and a plan for another number of processes; and all of it again in a
    second world of the same processes, where rank 1 asks first."""
    world.barrier()
    got = world.broadcast_object({"from": world.rank})
    again = World.connect(None, world.rank, world.size, device=world.device)
    if world.rank == 0:
        time.sleep(0.1)
    assert again.broadcast_object({"again": world.rank}) == {"again": 0}
    again.barrier()
    with pytest.raises(PlanError, match="4 devices and this job has 2 processes"):
        small(world)
    world.barrier()
    return got
