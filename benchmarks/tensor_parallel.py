"""Megatron's tensor and sequence parallelism of GPT and Llama with DTensor.

Inside a block columns and rows of its linears are sharded, with an all-gather before and a
reduce-scatter after each half; between blocks, in embedding, head and loss each rank has its part
of the sequence (Korthikanti et al., 2022). Gradients of parameters that every rank has whole are
summed after backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.models import gpt, llama
from benchmarks.training import (
    Job,
    NotAvailable,
    Step,
    checkpoint_blocks,
    compile_parts,
    make_half_optimizer,
    make_optimizer,
    training_step,
)

_SMALL = 2**20  # elements: smaller gradients travel together


def tensor_parallel(job: Job, *, checkpoint: bool) -> Step:
    """Every rank has the whole batch, and 1 / size of each block."""
    if job.size == 1:
        raise NotAvailable("for two devices or more")
    shard = _sharder(job)
    mesh = init_device_mesh(job.device.type, (job.size,))
    model = job.build()
    shard(model, mesh)
    optimizer = make_half_optimizer(model, job)
    if checkpoint:
        checkpoint_blocks(model)
    compile_parts(job, model)
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    split = _SEQUENCE_SPLIT[job.model_type](model, job.rank, job.size)
    group = mesh.get_group()
    return training_step(
        job, split, job.batch, optimizer, reduce_rest=lambda: _sum_gradients(whole, group)
    )


def fsdp_tensor_parallel(job: Job) -> Step:
    """FSDP2 over pairs that are tensor parallel."""
    if job.size < 4:
        raise NotAvailable("for four devices or more")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shard = _sharder(job)
    pairs, rows = job.size // 2, len(job.batch[0])
    if job.size % 2 or rows % pairs:
        raise NotAvailable(f"{rows} rows do not divide among {pairs} pairs")
    mesh = init_device_mesh(job.device.type, (pairs, 2), mesh_dim_names=("data", "tensor"))
    pair, part = divmod(job.rank, 2)
    model = job.build()
    shard(model, mesh["tensor"])
    compile_parts(job, model)
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    half = torch.bfloat16 if job.half else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
    split = _SEQUENCE_SPLIT[job.model_type](model, part, 2)
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh["data"], mp_policy=policy, reshard_after_forward=False)
    fully_shard(split, mesh=mesh["data"], mp_policy=policy, reshard_after_forward=False)
    named = dict(model.named_parameters())
    members = [named[name] for name in whole]
    group = mesh["tensor"].get_group()
    batch = tuple(t.tensor_split(pairs)[pair] for t in job.batch)
    return training_step(
        job,
        split,
        batch,
        make_optimizer(model.parameters(), job.device),
        reduce_rest=lambda: _sum_gradients(members, group),
    )


def _sharder(job: Job) -> Callable[[nn.Module, DeviceMesh], None]:
    if job.model_type not in _SHARDERS:
        raise NotAvailable(f"no tensor parallel plan for {job.model_type.__name__}")
    return _SHARDERS[job.model_type]


def _sum_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Over the parts of the sequence; losses are scaled by 1 / size already."""
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in found]
    small = [g for g in gradients if g.numel() < _SMALL]
    packed = [torch.cat([g.flatten() for g in small])] if small else []
    large = [g for g in gradients if g.numel() >= _SMALL]
    waits = [dist.all_reduce(t, group=group, async_op=True) for t in (*packed, *large)]
    for wait in waits:
        wait.wait()
    if small:
        parts = packed[0].split([g.numel() for g in small])
        torch._foreach_copy_(small, [p.view_as(g) for p, g in zip(parts, small, strict=True)])


class _ScaledLoss(torch.autograd.Function):
    """The loss as it is, with the gradient of 1 / size of it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, size: int) -> Tensor:
        ctx.size = size
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient / ctx.size, None


class _SplitGPT(nn.Module):
    """The mean loss of one part of the sequence."""

    def __init__(self, model: gpt.GPT, part: int, size: int) -> None:
        super().__init__()
        self.model, self.part, self.size = model, part, size

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        model, length = self.model, tokens_BS.shape[1] // self.size
        mine = slice(self.part * length, (self.part + 1) * length)
        position_S = torch.arange(mine.start, mine.stop, device=tokens_BS.device)
        x_BSH = model.token_embedding(tokens_BS[:, mine]) + model.position_embedding(position_S)
        x_BSH = model.dropout(x_BSH)
        for block in model.blocks:
            x_BSH = block(x_BSH)
        logits_BSV = model.head(model.norm(x_BSH))
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS[:, mine].flatten())
        return _ScaledLoss.apply(loss, self.size)  # type: ignore[no-any-return]


class _SplitLlama(nn.Module):
    """The mean loss of one part of the sequence."""

    def __init__(self, model: llama.Llama, part: int, size: int) -> None:
        super().__init__()
        self.model, self.part, self.size = model, part, size

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        model, length = self.model, tokens_BS.shape[1] // self.size
        mine = slice(self.part * length, (self.part + 1) * length)
        x_BSH = model.embedding(tokens_BS[:, mine])
        cos_SD, sin_SD = llama.rotary_angles(model.config, x_BSH.new_empty(tokens_BS.shape))
        for block in model.blocks:
            x_BSH = block(x_BSH, cos_SD, sin_SD)
        logits_BSV = model.head(model.norm(x_BSH))
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS[:, mine].flatten())
        return _ScaledLoss.apply(loss, self.size)  # type: ignore[no-any-return]


def _shard_gpt(model: nn.Module, mesh: DeviceMesh) -> None:
    """The fused projection's rows are regrouped first: a shard has whole heads of all three."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    size = mesh.size()
    members: Any = model.get_submodule("blocks")
    for block in members:
        attention = block.attention
        if attention.num_heads % size:
            raise NotAvailable(f"{attention.num_heads} heads do not divide among {size} ranks")
        for parameter in attention.qkv.parameters():
            grouped = parameter.data.unflatten(0, (3, size, -1)).transpose(0, 1)
            parameter.data = grouped.flatten(0, 2).contiguous()
        attention.num_heads //= size
        styles = {
            "attention": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
            "attention.qkv": ColwiseParallel(),
            "attention.out": RowwiseParallel(output_layouts=Shard(1)),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, styles)


def _shard_llama(model: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    members: Any = model.get_submodule("blocks")
    column = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")
    for block in members:
        heads = block.attention.key.out_features // block.attention.head_size
        if heads % mesh.size():
            raise NotAvailable(f"{heads} key heads do not divide among {mesh.size()} ranks")
        styles: dict[str, Any] = {name: ColwiseParallel() for name in column}
        styles |= {
            name: RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.out", "mlp.down")
        }
        styles["attention"] = PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        )
        styles["mlp"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        )
        parallelize_module(block, mesh, styles)


_SHARDERS: Mapping[type[nn.Module], Callable[[nn.Module, DeviceMesh], None]] = {
    gpt.GPT: _shard_gpt,
    llama.Llama: _shard_llama,
}
_SEQUENCE_SPLIT: Mapping[type[nn.Module], Callable[[Any, int, int], nn.Module]] = {
    gpt.GPT: _SplitGPT,
    llama.Llama: _SplitLlama,
}
