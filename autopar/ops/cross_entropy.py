"""`autopar::cross_entropy`: the sum of -log softmax(x)[target], in float32 whatever the type of x.

    lse[n]  = log sum_v exp(x[n, v])
    loss    = sum over n of lse[n] - x[n, target[n]]
    dx[n, v] = g (exp(x[n, v] - lse[n]) - [v = target[n]])

Rows whose target is `ignore_index` count nothing. Backward needs x as it is and one number per row:
no log-probabilities are kept, in x's type or a wider one, and a compiler makes each direction one
pass that reads x. float64 stays float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.ops.attention import accumulation_dtype
from autopar.ops.library import LIBRARY, define

# x [N, V], target int64 [N] -> loss [], number of rows that count [], lse [N]
define("cross_entropy(Tensor x, Tensor target, int ignore_index) -> (Tensor, Tensor, Tensor)")
# first: the class of x's column 0, where x is a shard of the classes
define(
    "cross_entropy_backward(Tensor grad, Tensor x, Tensor target, Tensor lse, int ignore_index,"
    " SymInt first) -> Tensor"
)


def cross_entropy(x: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain ATen body of `autopar::cross_entropy`, also its decomposition for a compiler."""
    wide = x.to(accumulation_dtype(x.dtype))
    top = wide.amax(1, keepdim=True)  # written as Inductor knows it: maximum and sum in one pass
    total = (wide - top).exp().sum(1, keepdim=True)
    lse = (total.log() + top).squeeze(1)
    counted = target != ignore_index
    picked = x.gather(1, torch.where(counted, target, 0).unsqueeze(1)).squeeze(1)
    loss = torch.where(counted, lse - picked.to(lse.dtype), 0.0).sum()
    return loss, counted.sum(dtype=lse.dtype), lse


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


LIBRARY.impl("cross_entropy", cross_entropy, "CompositeExplicitAutograd")
LIBRARY.impl("cross_entropy_backward", cross_entropy_backward, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::cross_entropy", _fake, lib=LIBRARY)
torch.library.register_fake(
    "autopar::cross_entropy_backward",
    lambda _grad, x, *_rest: x.new_empty(x.shape),
    lib=LIBRARY,
)
torch.library.register_autograd(
    "autopar::cross_entropy", _grad, setup_context=_setup_context, lib=LIBRARY
)
