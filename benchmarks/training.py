"""What all hand-made training steps share: the model of a job, its batch, its optimizer, its loss.

On GPUs blocks and loss are compiled, and compute is in bfloat16 with float32 master weights: what
autopar is asked for too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

Step = Callable[[], Tensor]  # the mean of what all ranks return is the loss of the global batch
LEARNING_RATE = 1e-4


class NotAvailable(Exception):
    """The baseline cannot run this model on so many devices; the same on every rank."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """build: a fresh model on `device`, the same on all ranks. batch: the whole global batch, on
    `device`. half: compute is in bfloat16. compiled: blocks and loss are."""

    build: Callable[[], nn.Module]
    model_type: type[nn.Module]
    batch: Any
    device: torch.device
    rank: int
    size: int
    half: bool = False
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32


class MasterWeights:
    """An optimizer of the parameters as they are; in the model they, and their gradients, are in
    another type from now on."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        self._optimizer = make_optimizer(self._masters, device)
        model.to(dtype)
        self._parameters = list(model.parameters())

    def step(self) -> None:
        pairs = zip(self._masters, self._parameters, strict=True)
        used = [(m, p) for m, p in pairs if p.grad is not None]
        for master, parameter in used:
            assert parameter.grad is not None
            master.grad = parameter.grad.to(master.dtype)
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        if used:
            masters, parameters = (
                [_local(t) for t in tensors] for tensors in zip(*used, strict=True)
            )
            torch._foreach_copy_(parameters, masters)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


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


def make_half_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer | MasterWeights:
    """Of a model in float32, which is in the job's type from now on."""
    if job.half:
        return MasterWeights(model, job.dtype, job.device)
    return make_optimizer(model.parameters(), job.device)


def checkpoint_blocks(model: nn.Module) -> None:
    """Every block is recomputed in backward."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    members = blocks(model)
    apply_activation_checkpointing(model, check_fn=lambda m: m in members)


def compile_parts(job: Job, model: nn.Module) -> None:
    """The blocks. The loss is compiled where it is called (`compiled_loss`). Shapes are static:
    blocks of other shapes are compiled for theirs, however many there are."""
    if not job.compiled:
        return
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    for block in blocks(model):
        block.compile(dynamic=False)


@contextlib.contextmanager
def compiled_loss(*, compiled: bool) -> Iterator[None]:
    """The models' cross-entropy is compiled inside."""
    plain = F.cross_entropy
    F.cross_entropy = _compiled_loss if compiled else plain
    try:
        yield
    finally:
        F.cross_entropy = plain


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits.float(), -1), targets)


_compiled_loss = torch.compile(_loss, dynamic=False)


def training_step(
    job: Job,
    model: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | MasterWeights,
    *,
    autocast: bool = False,
    reduce_rest: Callable[[], None] | None = None,
) -> Step:
    """Forward, backward, AdamW. autocast: parameters are in float32. reduce_rest: of gradients that
    backward leaves as they are."""

    def step() -> Tensor:
        region = torch.autocast(job.device.type, torch.bfloat16, enabled=autocast and job.half)
        with region, compiled_loss(compiled=job.compiled):
            loss: Tensor = model(**batch) if isinstance(batch, dict) else model(*batch)
        loss.backward()
        if reduce_rest is not None:
            reduce_rest()
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


def in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of a batch in the type that the model computes in."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch
    )


def channels_last(batch: Any) -> Any:
    """Images in the memory format that convolutions on GPUs want."""

    def lay_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return pytree.tree_map_only(Tensor, lay_out, batch)


def has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of modules, and what has parts of its own beside them: the
    usual unit of FSDP."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [member for member in child if any(True for _ in member.parameters())]
        elif any(isinstance(m, nn.ModuleList) for m in child.modules()):
            found += blocks(child)
        elif any(True for _ in child.children()):
            found.append(child)
    return found
