"""Convolutions of images with their channels last, in forward and in backward.

cuDNN's kernels for tensor cores want that layout, and Inductor brings the operands of a forward
convolution into it. It leaves a backward one as the graph has it: traced row-major, every
activation would be kept twice, once in each layout. Here operands are channels-last when they are
traced, and all that lies between convolutions follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class ChannelsLast:
    """Decompositions of the convolutions of one program. A value that both directions read, such
    as a weight, is brought into the layout once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        if not _fits(weight, rest[-1]) or (_is_last(x) and _is_last(weight)):
            return NotImplemented
        return aten.convolution.default(self._last(x), self._last(weight), *rest)

    def backward(
        self, otherwise: Callable[..., Any], grad: Tensor, x: Tensor, weight: Tensor, *rest: Any
    ) -> Any:
        """otherwise: the decomposition for operands that are in the layout. The gradient of the
        weight is row-major, as the weight at rest is."""
        if not _fits(weight, rest[-2]) or all(map(_is_last, (grad, x, weight))):
            return otherwise(grad, x, weight, *rest)
        operands = (self._last(t) for t in (grad, x, weight))
        dx, dweight, dbias = aten.convolution_backward.default(*operands, *rest)
        return dx, None if dweight is None else dweight.contiguous(), dbias

    def _last(self, x: Tensor) -> Tensor:
        if _is_last(x):
            return x
        known = self._known.get(id(x))
        if known is None:
            known = self._known[id(x)] = (x, x.contiguous(memory_format=torch.channels_last))
        return known[1]


def _fits(weight: Tensor, groups: int) -> bool:
    """Of images; grouped ones are slower so."""
    return weight.ndim == 4 and groups == 1


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
