"""Losses of a model that computes in a narrow type, in float32.

As autocast does: a loss of bfloat16 scores is computed in float32, and its gradient is rounded
once, when it reaches the scores. The cross-entropy of classes is one operator
(`ops.cross_entropy`), which reads narrow scores as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Of autocast's operators in float32, those that are losses or lead to one.
_LOSSES = (
    *("log_softmax", "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy_with_logits", "soft_margin_loss", "hinge_embedding_loss"),
    *("cosine_embedding_loss", "margin_ranking_loss", "multi_margin_loss", "triplet_margin_loss"),
    *("multilabel_margin_loss", "poisson_nll_loss", "gaussian_nll_loss"),
)


@contextlib.contextmanager
def wide_losses() -> Iterator[None]:
    """Inside, the losses of torch.nn.functional compute in float32."""
    old = {name: getattr(functional, name) for name in (*_LOSSES, "cross_entropy")}
    try:
        for name in _LOSSES:
            setattr(functional, name, _in_float32(old[name]))
        functional.cross_entropy = _cross_entropy(_in_float32(old["cross_entropy"]))
        yield
    finally:
        for name, function in old.items():
            setattr(functional, name, function)


def _in_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        return loss(*map(_widened, args), **{k: _widened(value) for k, value in kwargs.items()})

    return wide


def _widened(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_narrow else value


def _cross_entropy(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`F.cross_entropy` as one operator where it is that of a table of scores and one class each,
    all of one weight, summed or averaged."""

    def cross_entropy(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        fits = input.ndim == 2 and target.ndim == 1 and target.dtype is torch.int64
        fits = fits and input.dtype is not torch.float64 and label_smoothing == 0.0
        fits = fits and weight is None and size_average is None and reduce is None
        fits = fits and reduction in ("mean", "sum")
        if not fits:
            return otherwise(
                input,
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
            )
        loss: Tensor
        loss, rows, _ = torch.ops.autopar.cross_entropy(input, target, ignore_index)
        return loss if reduction == "sum" else loss / rows

    return cross_entropy
