"""One step of AdamW for many float32 tensors on a GPU, as one kernel at the speed of memory.

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

p: parameter, g: its gradient, m: average, v: average of squares, t: steps with this one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ops.library import has_triton

_ALIGN_BYTES = 16
_MOST_GUARDS = 256

# Types, devices, shapes and strides of tensors that fit, by what tensors they are likely to be.
_guards: dict[Hashable, Any] = {}


def fits(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> bool:
    """Whether `adamw` takes these, lists of one length. All on one CUDA device and float32. A
    parameter and what belongs to it are of one shape, lie alike in memory without gaps and begin at
    multiples of 16 bytes; a step has one element. Not while a CUDA graph is captured: it would keep
    the addresses of the first step's gradients."""
    lists = (parameters, gradients, averages, squares, steps)
    if not parameters or any(len(tensors) != len(parameters) for tensors in lists):
        return False
    if not parameters[0].is_cuda or not has_triton():
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    aligned = [*parameters, *gradients, *averages, *squares]
    return _lie_alike(lists, [*aligned, *steps]) and _begin_well(aligned)


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """In place, on the current stream, tensors that `fits`; as `torch._fused_adamw_`: `steps` count
    the one that is made."""
    from autopar.ops import adamw_kernel

    with torch.cuda.device(parameters[0].device):
        adamw_kernel.step(
            parameters,
            gradients,
            averages,
            squares,
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
        )
    torch.autograd.graph.increment_version([*parameters, *averages, *squares])


def _lie_alike(lists: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]) -> bool:
    """Whether types, devices, shapes and strides are as `fits` asks. They seldom change: the same
    again are known in one call. tensors: all of `lists`."""
    key = (len(lists[0]), id(lists[0][0]))
    guard = _guards.get(key)
    if guard is not None and guard.check(*tensors):
        return True
    device = tensors[0].device
    if not all(_is_plain(x, device) for x in tensors) or not all(map(_belong, *lists)):
        return False
    while len(_guards) >= _MOST_GUARDS:
        del _guards[next(iter(_guards))]
    _guards[key] = torch._C._dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    )
    return True


def _is_plain(x: Tensor, device: torch.device) -> bool:
    of_its_own = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__  # it is its own memory
    return of_its_own and x.layout is torch.strided and x.device == device


def _belong(
    parameter: Tensor, gradient: Tensor, average: Tensor, square: Tensor, step: Tensor
) -> bool:
    """Whether types, shapes and strides of what belongs to one parameter are as `fits` asks."""
    alike = (parameter, gradient, average, square)
    return (
        all(x.dtype is torch.float32 for x in (*alike, step))
        and step.numel() == 1
        and len({x.shape for x in alike}) == 1
        and (parameter.numel() == 0 or _lie_in_one_order(alike))
    )


def _lie_in_one_order(tensors: Sequence[Tensor]) -> bool:
    first = _order(tensors[0])
    return first is not None and all(_order(x) == first for x in tensors)


def _order(x: Tensor) -> tuple[int, ...] | None:
    """Dims of more than one element, outermost first; None where x has gaps or overlaps."""
    dims = [dim for dim, length in enumerate(x.shape) if length > 1]
    dims.sort(key=x.stride, reverse=True)
    inside = 1
    for dim in reversed(dims):
        if x.stride(dim) != inside:
            return None
        inside *= x.shape[dim]
    return tuple(dims)


def _begin_well(tensors: Sequence[Tensor]) -> bool:
    """Whether they begin at multiples of 16 bytes and have memory, if they have elements."""
    addresses = list(map(Tensor.data_ptr, tensors))
    if functools.reduce(operator.or_, addresses) % _ALIGN_BYTES:
        return False
    return all(x.numel() == 0 for x, address in zip(tensors, addresses, strict=True) if not address)
