"""What people use by hand: DDP, FSDP2, tensor parallel and pipeline of the same model.

Each maker takes a job and returns a step: forward, backward, AdamW. The strongest usual form of
each is meant: compiled blocks and loss, fused AdamW, collectives in bfloat16, channels last for
convolutions, with and without activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.pipelined import one_f_one_b
from benchmarks.tensor_parallel import fsdp_tensor_parallel, tensor_parallel
from benchmarks.training import (
    Job,
    NotAvailable,
    Step,
    blocks,
    channels_last,
    checkpoint_blocks,
    compile_parts,
    has_convolutions,
    in_dtype,
    make_half_optimizer,
    make_optimizer,
    rows_of,
    training_step,
)


def ddp(job: Job, *, whole: bool = False) -> Step:
    """Every rank has the whole model and its rows; gradients are averaged in buckets of float32.
    Autocast: the recipe of the manual. whole: model and loss are compiled at once, cut at the
    buckets, instead of by blocks."""
    batch = rows_of(several(job))
    model = job.build()
    batch = _lay_out(model, batch)
    if not whole:
        compile_parts(job, model)
    optimizer = make_optimizer(model.parameters(), job.device)
    wrapped = _replicated(job, model)
    if whole and job.compiled:
        wrapped.compile(dynamic=False)
        job = replace(job, compiled=False)  # the loss is a part of what is compiled
    return training_step(job, wrapped, batch, optimizer, autocast=True)


def ddp_half(job: Job, *, checkpoint: bool) -> Step:
    """The same with parameters and gradients in bfloat16, and float32 master weights."""
    batch = in_dtype(rows_of(several(job)), job.dtype)
    model = job.build()
    batch = _lay_out(model, batch)
    optimizer = make_half_optimizer(model, job)
    if checkpoint:
        checkpoint_blocks(model)
    compile_parts(job, model)
    return training_step(job, _replicated(job, model), batch, optimizer)


def _replicated(job: Job, model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[job.device] if job.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def fully_sharded(job: Job, *, reshard: bool, checkpoint: bool) -> Step:
    """FSDP2. reshard: ZeRO-3, gathered block by block; else ZeRO-2, gathered once per step."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    batch = rows_of(several(job))
    model = job.build()
    if has_convolutions(model):
        batch = channels_last(batch)  # FSDP2 wants weights in C's order
        for buffer in model.buffers():  # of BatchNorm, which wants them in the type of its weights
            buffer.data = buffer.data.to(job.dtype) if buffer.is_floating_point() else buffer.data
    if checkpoint:
        checkpoint_blocks(model)
    compile_parts(job, model)
    half = torch.bfloat16 if job.half else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
    mesh = init_device_mesh(job.device.type, (job.size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return training_step(job, model, batch, make_optimizer(model.parameters(), job.device))


def whole_compiled(job: Job, *, mode: str) -> Step:
    """One device: model and loss in one torch.compile, under autocast."""
    if job.size > 1:
        raise NotAvailable("for one device")
    model = job.build()
    batch = _lay_out(model, job.batch)
    if job.compiled:
        torch._dynamo.config.recompile_limit = 256
        model.compile(dynamic=False, mode=mode)
    optimizer = make_optimizer(model.parameters(), job.device)
    whole = replace(job, compiled=False)  # the loss is a part of what is compiled
    plain = training_step(whole, model, batch, optimizer, autocast=True)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return plain()

    return step


def several(job: Job) -> Job:
    if job.size == 1:
        raise NotAvailable("for two devices or more")
    return job


def _lay_out(model: nn.Module, batch: Any) -> Any:
    """Channels last for convolutions, weights and images."""
    if not has_convolutions(model):
        return batch
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last(batch)


BASELINES: Mapping[str, Callable[[Job], Step]] = {
    "ddp": ddp,
    "ddp, whole": partial(ddp, whole=True),
    "ddp bf16": partial(ddp_half, checkpoint=False),
    "ddp bf16, checkpointed": partial(ddp_half, checkpoint=True),
    "zero-2": partial(fully_sharded, reshard=False, checkpoint=False),
    "zero-2, checkpointed": partial(fully_sharded, reshard=False, checkpoint=True),
    "zero-3": partial(fully_sharded, reshard=True, checkpoint=False),
    "zero-3, checkpointed": partial(fully_sharded, reshard=True, checkpoint=True),
    "tensor parallel": partial(tensor_parallel, checkpoint=False),
    "tensor parallel, checkpointed": partial(tensor_parallel, checkpoint=True),
    "1f1b": partial(one_f_one_b, checkpoint=False),
    "1f1b, checkpointed": partial(one_f_one_b, checkpoint=True),
    "fsdp x tp": fsdp_tensor_parallel,
    "torch.compile": partial(whole_compiled, mode="default"),
    "torch.compile, reduce-overhead": partial(whole_compiled, mode="reduce-overhead"),
}
