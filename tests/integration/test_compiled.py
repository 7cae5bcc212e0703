"""Compiled programs: one device, and two processes whose parameters are sharded at rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.api import parallelize
from autopar.options import SearchOptions
from autopar.runtime.comm import World
from autopar.runtime.compiled import CompiledProgram
from autopar.runtime.launch import run_processes
from autopar.runtime.module import ParallelModel

ROWS, WIDTH = 8, 64
STEPS = 2


class Regression(nn.Module):
    """Two linear layers with a norm and dropout; the loss is the mean square error."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(2 * WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.down(self.dropout(self.norm(self.up(x).relu()))), y)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(ROWS, WIDTH, generator=generator) for k in ("x", "y")}


def train(devices: int, microbatches: int, *, compiled: bool) -> list[Tensor]:
    """Losses of some steps, and what this rank keeps of the parameters then."""
    torch.manual_seed(0)
    options = SearchOptions(
        num_stages=1,
        mesh_shape=(devices,),
        num_microbatches=microbatches,
        placements={"*.weight": "S0"} if devices > 1 else {},
        cache=False,
    )
    parallel: ParallelModel = parallelize(
        Regression(),
        batch(),
        cluster=f"cpu:1x{devices}",
        options=options,
        device="cpu",
        compiled=compiled,
    )
    executors = parallel._executors.values()
    players = [e.whole or e.backward for e in executors]
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        losses.append(parallel.train_step(batch()))
        optimizer.step()
        optimizer.zero_grad()
    losses.append(parallel.eval_step(batch()))
    assert all(
        isinstance(p, CompiledProgram) is compiled for p in players
    )  # and nothing fell back to the interpreter
    kept = [getattr(p, "to_local", lambda p=p: p)().detach() for p in parallel.parameters()]
    return [loss.detach() for loss in losses] + kept


def both(world: World) -> list[list[Tensor]]:
    return [train(world.size, 1, compiled=compiled) for compiled in (False, True)]


def check(interpreted: list[Tensor], compiled: list[Tensor]) -> None:
    for want, got in zip(interpreted, compiled, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_one_device(microbatches: int) -> None:
    interpreted, compiled = (train(1, microbatches, compiled=c) for c in (False, True))
    check(interpreted, compiled)


def test_two_processes() -> None:
    for found in run_processes(both, 2):
        check(*found)
