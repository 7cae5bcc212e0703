"""Compiled programs: one device, and two processes whose parameters are sharded at rest."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import functional

from autopar.api import parallelize
from autopar.compile import overlap, passes, peers
from autopar.compile.gradients import leave_narrow
from autopar.compile.inductor import compile_module
from autopar.compile.peers import Place
from autopar.errors import InternalError
from autopar.graph.precision import Precision
from autopar.ops.peers import PEER_COPY, PEER_WAIT
from autopar.options import SearchOptions
from autopar.runtime import compiled as runtime_compiled
from autopar.runtime.captured import CapturedProgram
from autopar.runtime.comm import World
from autopar.runtime.compiled import CompiledProgram
from autopar.runtime.gradients import Gradient
from autopar.runtime.gradients import is_open as is_open_sum
from autopar.runtime.launch import run_processes
from autopar.runtime.module import ParallelModel
from autopar.runtime.peers import PeerGroups
from benchmarks.models.gpt import GPT, GPTConfig, example_batch
from cost_models import Cluster
from tests.unit.runtime.recorder import Recorder

FAST = Cluster.from_toml("tests/clusters/fast_links.toml")
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


def make(
    devices: int, microbatches: int, *, compiled: bool, peer_copies: bool = False
) -> ParallelModel:
    torch.manual_seed(0)
    options = SearchOptions(
        num_stages=1,
        mesh_shape=(devices,),
        num_microbatches=microbatches,
        placements={"*.weight": "S0"} if devices > 1 else {},
        compiled=False,  # one plan for both
        cache=False,
    )
    return parallelize(
        Regression(),
        batch(),
        cluster=f"cpu:1x{devices}",
        options=options,
        device="cpu",
        compiled=compiled,
        peer_copies=peer_copies,
    )


def train(
    devices: int, microbatches: int, *, compiled: bool, peer_copies: bool = False
) -> list[Tensor]:
    """Losses of some steps, and what this rank keeps of the parameters then."""
    parallel = make(devices, microbatches, compiled=compiled, peer_copies=peer_copies)
    executors = parallel._executors.values()
    players = [e.whole or e.backward for e in executors]
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses = []
    with patch.object(runtime_compiled, "compile_module", wraps=compile_module) as compiler:
        parallel.eval_step(batch())  # compiles what it plays
        parallel.compile_ahead(batch())  # and this the rest
        ahead = compiler.call_count
        for _ in range(STEPS):
            losses.append(parallel.train_step(batch()))
            optimizer.step()
            optimizer.zero_grad()
        assert compiler.call_count == ahead  # for the right strides
    programs = [player for e in executors for _, player in e.training_programs()]
    everything = [p for e in executors for p in (e.forward, e.gather, *programs)]
    compiled_once = {id(p) for p in everything if isinstance(p, CompiledProgram)}
    assert ahead == len(compiled_once)
    losses.append(parallel.eval_step(batch()))
    wholes = [e.whole for e in executors if isinstance(e.whole, CompiledProgram)]
    wanted = [place for whole in wholes for place in whole._wanted.places]
    assert bool(wanted) is peer_copies
    assert all(
        isinstance(p, CompiledProgram) is compiled for p in players
    )  # and nothing fell back to the interpreter
    kept = [getattr(p, "to_local", lambda p=p: p)().detach() for p in parallel.parameters()]
    return [loss.detach() for loss in losses] + kept


def both(world: World) -> list[list[Tensor]]:
    check_optimizers(world.size)
    copied = train(world.size, 1, compiled=True, peer_copies=True)
    return [*(train(world.size, 1, compiled=c) for c in (False, True)), copied]


def check_optimizers(devices: int) -> None:
    """What knows of DTensors and what works on their shards alone agree."""
    parallel = make(devices, 1, compiled=False)
    parallel.train_step(batch())
    parameters = list(parallel.parameters())
    gradients = [p.grad for p in parameters]
    assert all(isinstance(g, Gradient) for g in gradients)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1e-2).full_tensor()
    assert norm > 1e-2
    torch.testing.assert_close(parallel.clip_grad_norm_(1e9), torch.tensor(1e-2), rtol=1e-4, atol=0)
    shards = [nn.Parameter(p.detach().to_local().clone()) for p in parameters]
    for shard, gradient in zip(shards, gradients, strict=True):
        shard.grad = gradient.to_local().clone()
    for fast in ({"fused": True}, {"foreach": True}):
        for owners in (parameters, shards):
            torch.optim.AdamW(owners, lr=0.1, **fast).step()
        for got, want in zip(parameters, shards, strict=True):
            assert torch.equal(got.detach().to_local(), want)
    split = next(g for g in gradients if g.placements[0].is_shard())
    whole = distribute_tensor(torch.zeros(split.shape), split.device_mesh, [Replicate()])
    torch._foreach_add_([whole], [split])  # laid out in two ways: DTensor's own
    assert torch.equal(whole.to_local(), split.full_tensor())


def check(interpreted: list[Tensor], compiled: list[Tensor]) -> None:
    for want, got in zip(interpreted, compiled, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_one_device(microbatches: int) -> None:
    interpreted, compiled = (train(1, microbatches, compiled=c) for c in (False, True))
    check(interpreted, compiled)


def capture(parallel: ParallelModel) -> Recorder:
    """Its steps are replays from the third on."""
    (executor,) = parallel._executors.values()
    assert isinstance(executor.whole, CompiledProgram)
    staying, recorder = [p.name for p in executor.stage.parameters], Recorder()
    executor.whole = CapturedProgram(
        executor.whole, staying=staying, seconds=None, recorder=recorder
    )
    return recorder


def test_gradients_of_a_captured_step_last_as_long_as_the_user_has_them() -> None:
    """Two steps are added up, one starts anew, twice; a graph fills the same memory each time."""
    records: list[list[Tensor]] = []
    for captured in (False, True):
        parallel = make(1, 1, compiled=True)
        if captured:
            recorder = capture(parallel)
        record = []
        for step in range(6):
            record.append(parallel.train_step(batch(), seed=step))
            if step % 3:
                record += [p.grad.clone() for p in parallel.parameters()]
            if step % 3 == 2:
                torch.optim.SGD(parallel.parameters(), lr=0.1).step()
                parallel.zero_grad()
        records.append(record)
    assert recorder.replays == 4
    check(*records)


def train_gpt(world: World, *, peer_copies: bool) -> list[Tensor]:
    """Losses and parameters. Gathers start as late as they may, so that places are used again."""
    config = GPTConfig(32, 2, 2, vocab_size=64, seq_len=16)
    torch.manual_seed(0)
    model, tokens = GPT(config), example_batch(config, 4)
    with patch.multiple(overlap, AHEAD=1, AHEAD_BYTES=0, SMALL_BYTES=0):
        parallel = parallelize(
            model,
            tokens,
            cluster=f"cpu:1x{world.size}",
            options=SearchOptions(
                num_stages=1,
                mesh_shape=(world.size,),
                num_microbatches=1,
                placements={"*weight": "S0"},
                cache=False,
            ),
            device="cpu",
            compiled=True,
            peer_copies=peer_copies,
        )
        losses = [parallel.train_step(tokens).detach()]
    kept = [p.grad for p in parallel.parameters() if p.grad is not None]
    return losses + [getattr(g, "to_local", lambda g=g: g)() for g in kept]


def gpts(world: World) -> list[list[Tensor]]:
    return [train_gpt(world, peer_copies=copies) for copies in (False, True)]


def test_a_stream_that_starts_with_gathered_rows() -> None:
    """Norms far behind the first read these rows where Inductor writes them into its kernels."""
    for collected, copied in run_processes(gpts, 2):
        check(collected, copied)


def train_open(*, is_open: bool, captured: bool = False) -> list[Tensor]:
    """Of steps in bfloat16: losses, gradients that are kept over the next step (twice; a graph
    writes over those that are not open), gradients of two steps, and parameters after AdamW."""
    config = GPTConfig(32, 4, 2, vocab_size=64, seq_len=16)
    torch.manual_seed(0)
    model, tokens = GPT(config), example_batch(config, 4)
    small = {"SMALL_BYTES": 0}
    closed = {} if is_open else {"_open_sums": lambda *_: {}}
    with patch.multiple(overlap, **small), patch.multiple(peers, **small, **closed):
        parallel = parallelize(
            model,
            tokens,
            cluster=replace(FAST, groups=(replace(FAST.groups[0], devices_per_node=2),)),
            precision=Precision.parse("bf16/bf16"),
            options=SearchOptions(
                num_stages=1,
                mesh_shape=(2,),
                num_microbatches=1,
                placements={"*weight": "S0"},
                cache=False,
            ),
            device="cpu",
            compiled=True,
            peer_copies=True,
        )
        parameters = [p for p in parallel.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        recorder = capture(parallel) if captured else None
        found = [parallel.train_step(tokens)]
        held = [p.grad for p in parameters[::2]]  # nobody asks for the others' values
        num_open = sum(is_open_sum(p.grad) for p in parameters)
        assert num_open >= 8 if is_open else num_open == 0, num_open
        optimizer.zero_grad()
        for _ in range(2):
            found.append(parallel.train_step(tokens))
        assert not any(map(is_open_sum, held))
        found += [p.grad.to_local().clone() for p in parameters]
        optimizer.step()
        optimizer.zero_grad()
        found.append(parallel.train_step(tokens))
        found.append(parallel.clip_grad_norm_(0.1))
        optimizer.step()
        optimizer.zero_grad()
        found.append(parallel.train_step(tokens))
        held += [g if is_open_sum(g) else local(g).clone() for g in (p.grad for p in parameters)]
        optimizer.zero_grad()
        for p in parameters:
            local(p).mul_(0.5)  # for other gradients
        found.append(parallel.train_step(tokens))
    assert recorder is None or recorder.replays == 4
    return [x.detach() for x in found] + [local(x).clone() for x in [*held, *parameters]]


def local(x: Tensor) -> Tensor:
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def opens(world: World) -> list[list[Tensor]]:
    assert world.size == 2
    return [
        train_open(is_open=False),
        train_open(is_open=True),
        train_open(is_open=True, captured=True),
    ]


def test_a_sum_that_is_left_to_its_reader_is_the_same() -> None:
    """Bit for bit, also where the user keeps it while the next step receives in its memory, and
    where that step is a graph, which makes its own part there, too."""
    for closed, *others in run_processes(opens, 2):
        for left_open in others:
            for want, got in zip(closed, left_open, strict=True):
                assert torch.equal(got, want)


def disagree(world: World) -> str:
    """The same places on both ranks, for copies in another order."""
    name = dist.group.WORLD.group_name
    groups = PeerGroups(world, [name])
    numbers = [world.rank, 1 - world.rank]
    with pytest.raises(InternalError) as error:
        groups.allocate([Place(name, torch.float32, 8)] * 2, numbers)
    assert len(groups.allocate([Place(name, torch.float32, 8)] * 2, [0, 1])) == 2
    return str(error.value)


def test_ranks_agree_on_the_places_of_their_copies() -> None:
    for text in run_processes(disagree, 2):
        assert "want different places" in text


def cast_on_the_way(world: World) -> Tensor:
    name = dist.group.WORLD.group_name
    (place,) = PeerGroups(world, [name]).allocate([Place(name, torch.bfloat16, 4)])
    value = torch.tensor([1.0, 1 / 3]) + world.rank
    PEER_COPY(value, place, False, True)
    PEER_WAIT(place, value)
    with pytest.raises(InternalError, match="into a place of"):
        PEER_COPY(value, place, True, False)
    return place.clone()


def test_what_goes_whole_to_all_ranks_is_cast() -> None:
    for place in run_processes(cast_on_the_way, 2):
        assert torch.equal(place, torch.tensor([1, 1 / 3, 2, 4 / 3], dtype=torch.bfloat16))


class Images(nn.Module):
    """Two convolutions and what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.norm(self.one(x)).relu()).mean((2, 3))).square().mean()


def train_images(*, narrow: bool, captured: bool = False) -> list[Tensor]:
    """Three steps are added up, twice. Losses, gradients and parameters."""
    torch.manual_seed(0)
    model, x = Images(), torch.randn(ROWS, 3, 9, 9)
    taken = leave_narrow if narrow else lambda module, _: module
    with patch.object(passes, "leave_narrow", taken):
        parallel = parallelize(
            model,
            (x,),
            cluster="cpu:1x1",
            options=SearchOptions(cache=False),
            precision=Precision.parse("bf16/bf16"),
            device="cpu",
            compiled=True,
            cuda_graph=False,  # in a process group of a machine with GPUs it runs on one
        )
        parallel.compile_ahead((x,))
    if captured:
        capture(parallel)
    weights = [parallel.one.weight, parallel.two.weight]
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1, fused=True)
    record = []
    for step in range(6):
        record.append(parallel.train_step((x * (step + 1),)).detach())
        if step % 3 == 0:  # not added to another one
            assert all((w.grad._made is not None) is narrow for w in weights)
        if step % 2:
            record += [w.grad.to_local().clone() for w in weights]
        if step:
            optimizer.step()
        if step % 3 == 2:
            parallel.zero_grad()
    return record + [p.detach().to_local() for p in parallel.parameters()]


def images(world: World) -> list[list[Tensor]]:
    assert world.size == 1
    plain, narrow = (train_images(narrow=n) for n in (False, True))
    return [plain, narrow, train_images(narrow=True, captured=True)]


def test_gradients_of_convolutions_come_as_they_are_made() -> None:
    ((plain, *others),) = run_processes(images, 1)
    for other in others:
        assert all(map(torch.equal, plain, other))


def test_two_processes() -> None:
    """Collectives, and copies from rank to rank in their place."""
    for interpreted, compiled, copied in run_processes(both, 2):
        check(interpreted, compiled)
        check(interpreted, copied)
