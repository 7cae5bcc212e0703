"""Ranks that write into each other's memory by copy engines, on GPUs of one host."""

from __future__ import annotations

import itertools
import random
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autopar.api import parallelize
from autopar.compile import overlap
from autopar.compile.peers import Place
from autopar.ops.peers import PEER_COPY, PEER_WAIT, part_of_place
from autopar.options import SearchOptions
from autopar.runtime.comm import World
from autopar.runtime.compiled import CompiledProgram
from autopar.runtime.launch import run_processes
from autopar.runtime.peers import PeerGroups
from benchmarks.models.gpt import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

NUMEL, ROUNDS = 1 << 20, 30
TIMEOUT = timedelta(seconds=60)


def value_of(rank: int, step: int) -> Tensor:
    """What a rank sends in a step: other numbers in each part."""
    parts = torch.arange(8, device="cuda").repeat_interleave(NUMEL // 8)
    return (parts + 10 * rank + 100 * step).float()


def expected(rank: int, size: int, step: int, *, scatter: bool, own: bool) -> Tensor:
    sent = NUMEL // size if scatter else NUMEL
    found = torch.empty((size if own else size - 1) * sent, device="cuda")
    for source in range(size):
        if own or source != rank:
            first = part_of_place(source, rank, own=own) * sent
            whole = value_of(source, step)
            part = whole.chunk(size)[rank] if scatter else whole
            found[first : first + sent] = part
    return found


def exchange(world: World) -> int:
    """Every kind of copy, between ranks of which another one is late each time; then as a graph."""
    name = dist.group.WORLD.group_name
    groups = PeerGroups(world, [name])
    assert groups.peers[name].size == world.size
    place, other = groups.allocate([Place(name, torch.float32, world.size * NUMEL)] * 2)
    chance = random.Random(world.rank)
    checked = 0
    for scatter, own in itertools.product((False, True), repeat=2):
        options = {"scatter": scatter, "own": own}

        def copied(value: Tensor, place: Tensor = place, how: Any = (scatter, own)) -> Tensor:
            PEER_COPY(value, place, *how)
            PEER_WAIT(place, value)
            return place * 1

        for step in range(ROUNDS):
            torch.cuda._sleep(chance.randrange(3_000_000))
            got = copied(value_of(world.rank, step))
            want = expected(world.rank, world.size, step, **options)
            assert torch.equal(got[: want.numel()], want), (options, step)
            checked += 1
        static = value_of(world.rank, 0)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            doubled = copied(static * 2, other)
        for step in range(ROUNDS):
            static.copy_(value_of(world.rank, step))
            torch.cuda._sleep(chance.randrange(3_000_000))
            graph.replay()
            want = 2 * expected(world.rank, world.size, step, **options)
            assert torch.equal(doubled[: want.numel()], want), ("graph", options, step)
            checked += 1
        torch.cuda.synchronize()
        world.barrier()
        graph.reset()
    return checked


def test_copies_arrive_whoever_is_late() -> None:
    assert run_processes(exchange, 2, device_type="cuda", timeout=TIMEOUT) == [8 * ROUNDS] * 2


def narrow(world: World) -> int:
    """What goes whole to all ranks is cast, and the place is used again at once."""
    name = dist.group.WORLD.group_name
    groups = PeerGroups(world, [name])
    (place,) = groups.allocate([Place(name, torch.bfloat16, world.size * NUMEL)])
    chance = random.Random(world.rank)
    for step in range(ROUNDS):
        torch.cuda._sleep(chance.randrange(3_000_000))
        value = value_of(world.rank, step) / 3
        PEER_COPY(value, place, False, True)
        PEER_WAIT(place, value)
        want = expected(world.rank, world.size, step, scatter=False, own=True) / 3
        assert torch.equal(place * 1, want.bfloat16()), step
    return ROUNDS


def test_what_goes_whole_to_all_ranks_is_cast() -> None:
    assert run_processes(narrow, 2, device_type="cuda", timeout=TIMEOUT) == [ROUNDS] * 2


def train(world: World, *, peer_copies: bool) -> list[Tensor]:
    """Losses of some steps and what this rank keeps."""
    torch.manual_seed(0)
    config = GPTConfig(256, 3, 4, vocab_size=512, seq_len=64)
    tokens = torch.randint(0, 512, (8, 65), generator=torch.Generator().manual_seed(1)).cuda()
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    options = SearchOptions(
        num_stages=1,
        mesh_shape=(world.size,),
        num_microbatches=1,
        placements={"*.weight": "S0"},
    )
    parallel = parallelize(
        GPT(config),
        batch,
        cluster=f"h100:1x{world.size}",
        options=options,
        compiled=True,
        cuda_graph=False,
        peer_copies=peer_copies,
    )
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses = []
    for _ in range(6):
        losses.append(parallel.train_step(batch).detach().cpu())
        optimizer.step()
        optimizer.zero_grad()
    (executor,) = parallel._executors.values()
    program = executor.whole
    assert isinstance(program, CompiledProgram)
    assert bool(program._wanted.places) is peer_copies
    kept = [getattr(p, "to_local", lambda p=p: p)().detach().cpu() for p in parallel.parameters()]
    return losses + kept


def both(world: World) -> list[list[Tensor]]:
    """Gathers start as late as they may, so that places are used again at once."""
    with patch.multiple(overlap, AHEAD=1, AHEAD_BYTES=0, SMALL_BYTES=0):
        return [train(world, peer_copies=copies) for copies in (False, True)]


def test_steps_are_those_of_nccl() -> None:
    """In float32, and of two ranks, every sum is the same."""
    for want, got in run_processes(both, 2, device_type="cuda", timeout=TIMEOUT):
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
