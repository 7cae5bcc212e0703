"""`autopar::cross_entropy`: the sum of -log softmax(x)[target], in float32 whatever the type of x.

    lse[n]  = log sum_v exp(x[n, v])
    loss    = sum over n of lse[n] - x[n, target[n]]
    dx[n, v] = g (exp(x[n, v] - lse[n]) - [v = target[n]])

Rows whose target is `ignore_index` count nothing. Backward needs x as it is and one number per row:
no log-probabilities are kept, in x's type or a wider one, and each direction is one pass that reads
x. float64 stays float64.

    softmax_sums              maximum and sum of exp relative to it: the parts of lse
    cross_entropy_rows        the loss of each row and dx, for whoever knows g beforehand
    cross_entropy_backward_,  dx in the memory of x
    cross_entropy_rows_
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.ops.attention import accumulation_dtype
from autopar.ops.library import LIBRARY, define

_ALIGN_BYTES = 16

# x [N, V], target int64 [N] -> loss [], number of rows that count [], lse [N]
define("cross_entropy(Tensor x, Tensor target, int ignore_index) -> (Tensor, Tensor, Tensor)")
define("softmax_sums(Tensor x) -> (Tensor top, Tensor total)")  # x [N, V] -> [N, 1] each
# first: the class of x's column 0, where x is a shard of the classes
_BACKWARD = "Tensor target, Tensor lse, int ignore_index, SymInt first"
define(f"cross_entropy_backward(Tensor grad, Tensor x, {_BACKWARD}) -> Tensor")
define(f"cross_entropy_backward_(Tensor grad, Tensor(a!) x, {_BACKWARD}) -> ()")
# grad [] -> losses [N], dx [N, V]
_ROWS = "Tensor target, int ignore_index"
define(f"cross_entropy_rows(Tensor grad, Tensor x, {_ROWS}) -> (Tensor losses, Tensor dx)")
define(f"cross_entropy_rows_(Tensor grad, Tensor(a!) x, {_ROWS}) -> Tensor")

own = torch.ops.autopar


def cross_entropy(x: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Body of `autopar::cross_entropy`, also its decomposition for a compiler."""
    losses, counted, lse = _losses(x, target, ignore_index)
    return losses.sum(), counted.sum(dtype=lse.dtype), lse


def softmax_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain ATen body of `autopar::softmax_sums`, written as Inductor knows it: one pass."""
    wide = x.to(accumulation_dtype(x.dtype))
    top = wide.amax(1, keepdim=True)
    return top, (wide - top).exp().sum(1, keepdim=True)


def cross_entropy_backward(
    grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int, first: int
) -> Tensor:
    """Plain ATen body of `autopar::cross_entropy_backward`: one pointwise kernel."""
    wide = x.to(lse.dtype)
    classes = torch.arange(x.shape[1], device=x.device) + first
    counted = (target != ignore_index).unsqueeze(1)
    hit = (classes.unsqueeze(0) == target.unsqueeze(1)).to(lse.dtype)
    dx = torch.where(counted, ((wide - lse.unsqueeze(1)).exp() - hit) * grad, 0.0)
    return dx.to(x.dtype)


def cross_entropy_rows(
    grad: Tensor, x: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Plain ATen body of `autopar::cross_entropy_rows`."""
    losses, _, lse = _losses(x, target, ignore_index)
    return losses, cross_entropy_backward(grad, x, target, lse, ignore_index, 0)


def _losses(x: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, whether it counts, lse: [N] each."""
    top, total = own.softmax_sums(x)
    lse = (total.log() + top).squeeze(1)
    counted = target != ignore_index
    picked = x.gather(1, torch.where(counted, target, 0).unsqueeze(1)).squeeze(1)
    return torch.where(counted, lse - picked.to(lse.dtype), 0.0), counted, lse


# ---- on CUDA


def has_kernel_for_rows(x: Tensor) -> bool:
    """Whether rows begin where loads of several elements may."""
    narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    aligned = x.stride(0) * x.itemsize % _ALIGN_BYTES == 0 and x.stride(1) == 1
    return x.device.type == "cuda" and narrow and aligned


def _kernels() -> Any:
    """Triton comes with builds of torch for CUDA."""
    from autopar.ops import cross_entropy_kernel

    return cross_entropy_kernel


def _softmax_sums_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels().softmax_sums(x) if has_kernel_for_rows(x) else softmax_sums(x)


def _backward_cuda(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    if not has_kernel_for_rows(x):
        return cross_entropy_backward(grad, x, *rest)
    dx = x.new_empty(x.shape)
    _kernels().gradient(grad, x, *rest, dx)
    return dx


def _rows_cuda(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not has_kernel_for_rows(x):
        return cross_entropy_rows(grad, x, *rest)
    dx = x.new_empty(x.shape)
    return _kernels().rows(grad, x, *rest, dx), dx


# ---- in place


def _backward_in_place(grad: Tensor, x: Tensor, *rest: Any) -> None:
    if has_kernel_for_rows(x):
        _kernels().gradient(grad, x, *rest, x)
    else:
        x.copy_(cross_entropy_backward(grad, x, *rest))


def _rows_in_place(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    if has_kernel_for_rows(x):
        losses: Tensor = _kernels().rows(grad, x, *rest, x)
        return losses
    losses, dx = cross_entropy_rows(grad, x, *rest)
    x.copy_(dx)
    return losses


# ---- what a compiler and autograd ask


def _fake(x: Tensor, target: Tensor, _ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    loss, count = (x.new_empty((), dtype=dtype) for _ in range(2))
    return loss, count, x.new_empty(target.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, ctx.ignore_index = inputs
    _, rows, lse = output
    ctx.mark_non_differentiable(rows, lse)
    ctx.save_for_backward(x, target, lse)


def _grad(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    x, target, lse = ctx.saved_tensors
    dx = torch.ops.autopar.cross_entropy_backward(grad, x, target, lse, ctx.ignore_index, 0)
    return dx, None, None


def _fake_losses(_grad: Tensor, x: Tensor, target: Tensor, _ignore_index: int) -> Tensor:
    return x.new_empty(target.shape, dtype=accumulation_dtype(x.dtype))


def _fake_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    top, total = (x.new_empty((len(x), 1), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return top, total


_KERNELS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "softmax_sums": (softmax_sums, _softmax_sums_cuda),
    "cross_entropy": (cross_entropy, cross_entropy),
    "cross_entropy_backward": (cross_entropy_backward, _backward_cuda),
    "cross_entropy_backward_": (_backward_in_place, _backward_in_place),
    "cross_entropy_rows": (cross_entropy_rows, _rows_cuda),
    "cross_entropy_rows_": (_rows_in_place, _rows_in_place),
}
_FAKES: Mapping[str, Callable[..., Any]] = {
    "softmax_sums": _fake_sums,
    "cross_entropy": _fake,
    "cross_entropy_backward": lambda _grad, x, *_rest: x.new_empty(x.shape),
    "cross_entropy_backward_": lambda *_args: None,
    "cross_entropy_rows": lambda *args: (_fake_losses(*args), args[1].new_empty(args[1].shape)),
    "cross_entropy_rows_": _fake_losses,
}
for _name, (_on_cpu, _on_cuda) in _KERNELS.items():
    LIBRARY.impl(_name, _on_cpu, "CPU")
    LIBRARY.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"autopar::{_name}", _FAKES[_name], lib=LIBRARY)
torch.library.register_autograd(
    "autopar::cross_entropy", _grad, setup_context=_setup_context, lib=LIBRARY
)
