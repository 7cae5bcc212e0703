"""What people use by hand: DDP, FSDP2 and tensor parallel of the same model, in the same job.

Each maker takes a fresh model and the global batch and returns a step: forward, backward, AdamW.
On GPUs blocks and loss are compiled, and compute is in bfloat16 with float32 parameters, gradients
reduced in bfloat16: what autopar is asked for too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from benchmarks.models import gpt, llama

Step = Callable[[], Tensor]
LEARNING_RATE = 1e-4


class NotAvailable(Exception):
    """The baseline cannot run this model; the same on every rank."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """model: on `device`, the same on all ranks. batch: the whole global batch, on `device`."""

    model: nn.Module
    batch: Any
    device: torch.device
    rank: int
    size: int


def ddp(job: Job) -> Step:
    """Every rank has the whole model and its rows; gradients are averaged in buckets. Autocast."""
    compile_parts(job)
    wrapped = nn.parallel.DistributedDataParallel(
        job.model,
        device_ids=[job.device] if job.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    return training_step(wrapped, rows_of(job), autocast=job.device.type == "cuda")


def zero2(job: Job) -> Step:
    """FSDP2 without resharding: gathered once per step."""
    return _fully_sharded(job, reshard=False, checkpoint=False)


def zero3(job: Job) -> Step:
    """FSDP2: parameters, gradients and optimizer states sharded, gathered block by block."""
    return _fully_sharded(job, reshard=True, checkpoint=False)


def zero3_checkpointed(job: Job) -> Step:
    """FSDP2, every block recomputed in backward."""
    return _fully_sharded(job, reshard=True, checkpoint=True)


def _fully_sharded(job: Job, *, reshard: bool, checkpoint: bool) -> Step:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    members = blocks(job.model)
    if checkpoint:
        apply_activation_checkpointing(job.model, check_fn=lambda m: m in members)
        members = blocks(job.model)
    compile_parts(job)
    half = torch.bfloat16 if job.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
    mesh = init_device_mesh(job.device.type, (job.size,))
    for block in members:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(job.model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return training_step(job.model, rows_of(job))


def tensor_parallel(job: Job) -> Step:
    """Megatron's column and row parallel linears of each block; every rank has the whole batch."""
    makers = {gpt.GPT: _shard_gpt, llama.Llama: _shard_llama}
    if type(job.model) not in makers:
        raise NotAvailable(f"no tensor parallel plan for {type(job.model).__name__}")
    mesh = init_device_mesh(job.device.type, (job.size,))
    makers[type(job.model)](job.model, mesh)
    compile_parts(job)
    return training_step(job.model, job.batch, autocast=job.device.type == "cuda")


BASELINES: Mapping[str, Callable[[Job], Step]] = {
    "ddp": ddp,
    "zero-2": zero2,
    "zero-3": zero3,
    "zero-3, checkpointed": zero3_checkpointed,
    "tensor parallel": tensor_parallel,
}


def make_optimizer(parameters: Any, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused on CUDA. DTensors and plain tensors, which one fused call cannot mix, are groups
    of their own."""
    mixed = list(parameters)
    groups = [
        [p for p in mixed if isinstance(p, DTensor)],
        [p for p in mixed if not isinstance(p, DTensor)],
    ]
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group],
        lr=LEARNING_RATE,
        fused=device.type == "cuda",
    )


def compile_parts(job: Job) -> None:
    """On GPUs: the blocks. The loss is compiled where it is called (`compiled_loss`)."""
    if job.device.type != "cuda":
        return
    for block in blocks(job.model):
        block.compile()


@contextlib.contextmanager
def compiled_loss(device: torch.device) -> Iterator[None]:
    """On GPUs: the models' cross-entropy is compiled inside."""
    plain = F.cross_entropy
    F.cross_entropy = _compiled_loss if device.type == "cuda" else plain
    try:
        yield
    finally:
        F.cross_entropy = plain


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits.float(), -1), targets)


_compiled_loss = torch.compile(_loss)


def training_step(model: nn.Module, batch: Any, *, autocast: bool = False) -> Step:
    parameters = list(model.parameters())
    device = parameters[0].device
    optimizer = make_optimizer(parameters, device)

    def step() -> Tensor:
        region = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        with region, compiled_loss(device):
            loss: Tensor = model(**batch) if isinstance(batch, dict) else model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def rows_of(job: Job) -> Any:
    """The rows of the batch that this rank trains on."""

    def cut(tensor: Tensor) -> Tensor:
        if len(tensor) % job.size:
            raise NotAvailable(f"{len(tensor)} rows do not divide among {job.size} ranks")
        count = len(tensor) // job.size
        return tensor[job.rank * count : (job.rank + 1) * count]

    return pytree.tree_map_only(Tensor, cut, job.batch)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of modules: the usual unit of FSDP."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [member for member in child if any(True for _ in member.parameters())]
        else:
            found += blocks(child)
    return found


def _shard_gpt(model: nn.Module, mesh: DeviceMesh) -> None:
    """The fused projection's rows are regrouped first: a shard has whole heads of all three."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
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
            "attention.qkv": ColwiseParallel(),
            "attention.out": RowwiseParallel(),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, styles)


def _shard_llama(model: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
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
        styles |= {name: RowwiseParallel() for name in ("attention.out", "mlp.down")}
        parallelize_module(block, mesh, styles)
