"""Steps that are one CUDA graph against steps that are launched kernel by kernel, on GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.cuda import current_stream

from autopar.api import parallelize
from autopar.compile import overlap, peers
from autopar.graph.precision import Precision
from autopar.options import SearchOptions
from autopar.runtime.captured import CapturedProgram, Results, record
from autopar.runtime.comm import World
from autopar.runtime.launch import run_processes
from autopar.runtime.module import ParallelModel
from benchmarks.models.gpt import GPT, GPTConfig
from cost_models import Cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAST = Cluster.from_toml("tests/clusters/fast_links.toml")  # it shards what an H100 would not
CONFIG = GPTConfig(64, 2, 4, vocab_size=512, seq_len=64, dropout=0.1)
ROWS, STEPS = 8, 20
ACCUMULATED = (7, 8)  # steps after which gradients are kept
ALIVE: list[ParallelModel] = []  # until the process ends


def train(world: World | None, *, graph: bool, precision: str, peer_copies: bool) -> list[Tensor]:
    """Losses of all steps and the parameters that this rank keeps at the end."""
    devices = 1 if world is None else world.size
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"num_stages": 1, "mesh_shape": (devices,), "num_microbatches": 1}
    tokens = torch.randint(0, 512, (STEPS, ROWS, 65), generator=generator).cuda()
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    parallel = parallelize(
        GPT(CONFIG),
        batches[0],
        cluster=replace(FAST, groups=(replace(FAST.groups[0], devices_per_node=devices),)),
        options=SearchOptions(**options, placements={"*": "S0"} if devices > 1 else {}),
        precision=Precision.parse(precision),
        compiled=True,
        cuda_graph=graph,
        peer_copies=peer_copies,
    )
    # of a key's bias the gradient is nothing but rounding: a large epsilon keeps it that
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3, eps=1e-2, fused=True)
    losses = []
    for step, batch in enumerate(batches):
        losses.append(parallel.train_step(batch))
        if step in ACCUMULATED:
            continue
        if step % 2:  # what clips adds up sums that are open
            parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    (executor,) = parallel._executors.values()
    captured = isinstance(executor.whole, CapturedProgram) and executor.whole.lends
    assert captured is graph
    ALIVE.append(parallel)
    kept = [getattr(p, "to_local", lambda p=p: p)().detach().cpu() for p in parallel.parameters()]
    return [loss.detach().cpu() for loss in losses] + kept


def both(world: World | None, precision: str, *, peer_copies: bool = False) -> list[list[Tensor]]:
    return [
        train(world, graph=graph, precision=precision, peer_copies=peer_copies)
        for graph in (False, True)
    ]


def check(launched: list[Tensor], captured: list[Tensor]) -> None:
    """The same kernels in the same order; sums by atomic additions alone may differ."""
    for want, got in zip(launched, captured, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert len({float(loss) for loss in captured[:STEPS]}) == STEPS


def test_a_capture_that_fails_half_way_leaves_nothing_behind() -> None:
    """Another stream has not come back when memory is out."""
    x, side, before = torch.ones(1 << 20, device="cuda"), torch.cuda.Stream(), current_stream()

    def play() -> Results:
        side.wait_stream(current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        kept = x * 2
        raise torch.cuda.OutOfMemoryError(f"no memory beside {kept.nbytes}")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="no memory"):
        record(play)
    assert current_stream() == before
    torch.cuda.empty_cache()
    assert float((x * 2).sum()) == 2 << 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_device(precision: str) -> None:
    check(*both(None, precision))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices() -> None:
    """And the job ends while a graph that uses its groups is alive."""
    for found in run_processes(both, 2, "bf16/bf16", device_type="cuda"):
        check(*found)


def copying(world: World) -> list[list[Tensor]]:
    """Ranks copy all that may be copied, and leave sums open, in a graph, too."""
    small = {"SMALL_BYTES": 0}
    with patch.multiple(overlap, **small), patch.multiple(peers, **small):
        found = both(world, "bf16/bf16", peer_copies=True)
    for parallel in ALIVE[-2:]:
        (executor,) = parallel._executors.values()
        assert executor.whole is not None and executor.whole.addends
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_that_copy() -> None:
    for found in run_processes(copying, 2, device_type="cuda"):
        check(*found)
