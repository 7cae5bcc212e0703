"""Pipeline parallelism by torch.distributed.pipelining: one stage per rank, 1F1B.

Stages have about equal matmul work: the head counts as as many blocks as its weights weigh. A
parameter that two stages use (a tied embedding) is on both, its gradients summed after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import gpt, llama, moe, t5, wide_resnet
from benchmarks.training import (
    Job,
    NotAvailable,
    Step,
    channels_last,
    checkpoint_blocks,
    compile_parts,
    compiled_loss,
    has_convolutions,
    in_dtype,
    make_half_optimizer,
)

MICROBATCHES = 8


def one_f_one_b(job: Job, *, checkpoint: bool) -> Step:
    """Parameters and gradients in the job's dtype, with float32 master weights. Up to MICROBATCHES
    microbatches, a divisor of the rows."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    if job.size == 1:
        raise NotAvailable("for two devices or more")
    if job.model_type not in _STAGES or (job.model_type is t5.T5 and job.size != 2):
        raise NotAvailable(f"no cut of {job.model_type.__name__} into {job.size} stages")
    rows = len(job.batch[0])
    count = max(n for n in range(1, MICROBATCHES + 1) if rows % n == 0)
    if count < job.size:
        raise NotAvailable(f"{count} microbatches for {job.size} stages")
    batch = in_dtype(job.batch, job.dtype)
    model = job.build()
    if has_convolutions(model):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = channels_last(batch)
    if checkpoint:
        checkpoint_blocks(model)
    module = _STAGES[job.model_type](model, job.rank, job.size)
    del model
    optimizer = make_half_optimizer(module, job)
    owners = _owners(module)
    compile_parts(job, module)
    stage = PipelineStage(module, job.rank, job.size, job.device)
    schedule = Schedule1F1B(stage, count, loss_fn=lambda loss, _: loss.sum())
    first, last = job.rank == 0, job.rank == job.size - 1
    ends = dist.new_group([0, job.size - 1])
    labels = batch[-1]

    def step() -> Tensor:
        losses: list[Tensor] = []
        with compiled_loss(compiled=job.compiled):
            if last:
                schedule.step(target=labels, losses=losses, labels=labels)
            else:
                schedule.step(*(batch[:1] if first else ()))
        for parameter in owners:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=ends)
        optimizer.step()
        optimizer.zero_grad()
        if not last:
            return torch.zeros((), device=job.device)
        return torch.stack(losses).detach().float().mean() * job.size  # the others return 0

    return step


def _owners(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that the first and the last stage share."""
    return [p for name, p in module.named_parameters() if name in getattr(module, "shared", ())]


def _share(num_blocks: int, head_blocks: float, rank: int, size: int) -> range:
    """Blocks of a rank, where the head weighs as much as `head_blocks`."""
    each = (num_blocks + head_blocks) / size
    bounds = [min(num_blocks, round(each * k)) for k in range(size)]
    return range(bounds[rank], [*bounds, num_blocks][rank + 1])


class _GPTStage(nn.Module):
    def __init__(self, model: gpt.GPT, rank: int, size: int) -> None:
        super().__init__()
        hidden = model.norm.weight.numel()
        mine = _share(len(model.blocks), len(model.head.weight) / (12 * hidden), rank, size)
        self.blocks = nn.ModuleList(model.blocks[i] for i in mine)
        self.shared: tuple[str, ...] = ()
        self.first, self.last = rank == 0, rank == size - 1
        tied = model.head.weight is model.token_embedding.weight
        if self.first:
            self.token_embedding = model.token_embedding
            self.position_embedding = model.position_embedding
            self.dropout = model.dropout
            self.shared = ("token_embedding.weight",) if tied else ()
        if self.last:
            self.norm, self.head = model.norm, model.head
            self.shared = ("head.weight",) if tied else ()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.first:
            position_S = torch.arange(x.shape[1], device=x.device)
            x = self.dropout(self.token_embedding(x) + self.position_embedding(position_S))
        for block in self.blocks:
            x = block(x)
        if labels is None:
            return x
        return _token_loss(self.head(self.norm(x)), labels)


class _LlamaStage(nn.Module):
    def __init__(self, model: llama.Llama, rank: int, size: int) -> None:
        super().__init__()
        block = sum(p.numel() for p in model.blocks[0].parameters())
        head = model.head.weight.numel() / block
        mine = _share(len(model.blocks), head, rank, size)
        self.config = model.config
        self.blocks = nn.ModuleList(model.blocks[i] for i in mine)
        self.shared: tuple[str, ...] = ()
        self.first, self.last = rank == 0, rank == size - 1
        if self.first:
            self.embedding = model.embedding
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.first:
            x = self.embedding(x)
        cos_SD, sin_SD = llama.rotary_angles(self.config, x)
        for block in self.blocks:
            x = block(x, cos_SD, sin_SD)
        if labels is None:
            return x
        return _token_loss(self.head(self.norm(x)), labels)


class _MoEStage(nn.Module):
    """The balance loss travels beside the activations."""

    def __init__(self, model: moe.MoE, rank: int, size: int) -> None:
        super().__init__()
        mine = _share(len(model.blocks), 1.0, rank, size)
        self.balance_weight = model.balance_weight
        self.blocks = nn.ModuleList(model.blocks[i] for i in mine)
        self.first, self.last = rank == 0, rank == size - 1
        self.shared: tuple[str, ...] = ()
        if self.first:
            self.position_embedding = model.position_embedding
        if self.first or self.last:
            self.token_embedding = model.token_embedding
            self.shared = ("token_embedding.weight",)
        if self.last:
            self.norm = model.norm

    def forward(
        self, x: Tensor, balance_1: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.first:
            position_S = torch.arange(x.shape[1], device=x.device)
            x = self.token_embedding(x) + self.position_embedding(position_S)
        total_1 = x.new_zeros(1, dtype=torch.float32) if balance_1 is None else balance_1
        for block in self.blocks:
            x, balance = block(x)
            if balance is not None:
                total_1 = total_1 + balance
        if labels is None:
            return x, total_1
        logits = F.linear(self.norm(x), self.token_embedding.weight)
        return _token_loss(logits, labels) + self.balance_weight * total_1


class _T5Stage(nn.Module):
    """Encoder and decoder: two stages."""

    def __init__(self, model: t5.T5, rank: int, size: int) -> None:
        super().__init__()
        del size
        self.embedding, self.logit_scale = model.embedding, model.logit_scale
        self.stack = model.encoder if rank == 0 else model.decoder
        self.shared = ("embedding.weight",)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            memory: Tensor = self.stack(self.embedding(x))
            return memory
        shifted_BT = F.pad(labels[:, :-1], (1, 0))
        y_BTH = self.stack(self.embedding(shifted_BT), x)
        return _token_loss(F.linear(y_BTH * self.logit_scale, self.embedding.weight), labels)


class _Contiguous(torch.autograd.Function):
    """What is sent has to be, gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        return gradient.contiguous()


class _WideResNetStage(nn.Module):
    """All stages of a ResNet but its first block have about the same work per block."""

    def __init__(self, model: wide_resnet.WideResNet, rank: int, size: int) -> None:
        super().__init__()
        mine = _share(len(model.blocks), 0.0, rank, size)
        self.blocks = nn.ModuleList(model.blocks[i] for i in mine)
        self.first, self.last = rank == 0, rank == size - 1
        self.shared: tuple[str, ...] = ()
        if self.first:
            self.conv_stem, self.norm_stem = model.conv_stem, model.norm_stem
        if self.last:
            self.head = model.head

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.first:
            x = F.relu(self.norm_stem(self.conv_stem(x)))
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        else:
            x = _Contiguous.apply(x)
            x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
        for block in self.blocks:
            x = block(x)
        if labels is None:
            sent: Tensor = _Contiguous.apply(x)
            return sent
        return F.cross_entropy(self.head(x.mean(dim=(2, 3))), labels).reshape(1)


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()).reshape(1)


_STAGES: Mapping[type[nn.Module], Callable[[Any, int, int], nn.Module]] = {
    gpt.GPT: _GPTStage,
    llama.Llama: _LlamaStage,
    moe.MoE: _MoEStage,
    t5.T5: _T5Stage,
    wide_resnet.WideResNet: _WideResNetStage,
}
