"""One step of AdamW for many float32 tensors on a GPU, as one kernel at the speed of memory.

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

p: parameter, g: its gradient, m: average, v: average of squares, t: steps with this one.

A gradient may be in bfloat16, and in another order in memory than its parameter, as a convolution
makes it; or it is the sum of two tensors in bfloat16, one of which came from another rank: then
nobody has to write it in float32 first.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ops.library import has_triton

Turn = tuple[int, int]

ALIGN_BYTES = 16
_MOST_GUARDS = 256
_MOST_TURNS = 4096
_MOST_TURNED = 2**31 - 2**16  # elements of a gradient that is not in float32: they have indices

# Types, devices, shapes and strides of tensors that fit, by what tensors they are likely to be.
_guards: dict[Hashable, Any] = {}


def fits(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    addends: Sequence[Tensor | None] = (),
) -> bool:
    """Whether `adamw` takes these, lists of one length. All on one CUDA device and float32. A
    parameter and what belongs to it are of one shape, lie alike in memory without gaps and begin at
    multiples of 16 bytes; a step has one element. A gradient may be in bfloat16 instead, with
    some dims of the parameter moved inside the others (`_turn`); where it has an addend, both are
    in bfloat16, and lie as the parameter does. No addends at all is an empty list. Not while a CUDA
    graph is captured: it would keep the addresses of the first step's gradients."""
    addends = addends or [None] * len(parameters)
    lists = (parameters, gradients, averages, squares, steps, addends)
    if not parameters or any(len(tensors) != len(parameters) for tensors in lists):
        return False
    if not parameters[0].is_cuda or not has_triton():
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    added = [addend for addend in addends if addend is not None]
    aligned = [*parameters, *gradients, *averages, *squares, *added]
    return _lie_alike(lists, [*aligned, *steps]) and _begin_well(aligned)


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    addends: Sequence[Tensor | None] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """In place, on the current stream, tensors that `fits`; as `torch._fused_adamw_`: `steps` count
    the one that is made. The gradient is the sum of `gradients` and `addends`, where these are."""
    from autopar.ops import adamw_kernel

    with torch.cuda.device(parameters[0].device):
        adamw_kernel.step(
            parameters,
            gradients,
            averages,
            squares,
            steps,
            turns=list(map(_turn_of, parameters, gradients)),
            addends=addends or [None] * len(parameters),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
        )
    torch.autograd.graph.increment_version([*parameters, *averages, *squares])


def _lie_alike(lists: Sequence[Sequence[Any]], tensors: Sequence[Tensor]) -> bool:
    """Whether types, devices, shapes and strides are as `fits` asks. They seldom change: the same
    again are known in one call. tensors: all of `lists`."""
    key = (len(lists[0]), id(lists[0][0]), tuple(addend is None for addend in lists[-1]))
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
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    step: Tensor,
    addend: Tensor | None,
) -> bool:
    """Whether types, shapes and strides of what belongs to one parameter are as `fits` asks."""
    kept = (parameter, average, square)
    if not all(x.dtype is torch.float32 for x in (*kept, step)) or step.numel() != 1:
        return False
    if len({x.shape for x in (*kept, gradient)}) != 1:
        return False
    narrow = gradient.dtype is torch.bfloat16
    if not narrow and gradient.dtype is not torch.float32:
        return False
    lie_alike: tuple[Tensor, ...] = kept if narrow else (*kept, gradient)
    if addend is not None:
        if not narrow or (addend.dtype, addend.shape) != (gradient.dtype, gradient.shape):
            return False
        lie_alike = (*kept, gradient, addend)
    if parameter.numel() == 0:
        return True
    if not _lie_in_one_order(lie_alike):
        return False
    return not narrow or (
        parameter.numel() <= _MOST_TURNED and _turn_of(parameter, gradient) is not None
    )


def _lie_in_one_order(tensors: Sequence[Tensor]) -> bool:
    first = _order(tensors[0].shape, tensors[0].stride())
    return first is not None and all(_order(x.shape, x.stride()) == first for x in tensors)


def _order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Dims of more than one element, outermost first; None where there are gaps or overlaps."""
    dims = [dim for dim, length in enumerate(shape) if length > 1]
    dims.sort(key=strides.__getitem__, reverse=True)
    inside = 1
    for dim in reversed(dims):
        if strides[dim] != inside:
            return None
        inside *= shape[dim]
    return tuple(dims)


def _turn_of(parameter: Tensor, gradient: Tensor) -> Turn | None:
    """None for a gradient in float32, and for one whose order is no turn of its parameter's."""
    if gradient.dtype is torch.float32:
        return None
    return _turn(gradient.shape, parameter.stride(), gradient.stride())


@functools.lru_cache(maxsize=_MOST_TURNS)
def _turn(shape: tuple[int, ...], strides: tuple[int, ...], turned: tuple[int, ...]) -> Turn | None:
    """How element (o, a, b) of a tensor in row-major order over [O, A, B] lies at (o, b, a) of
    another one over [O, B, A]: (A, B). None where it lies otherwise. A weight [O, I, H, W] and its
    gradient with channels last: (I, H W); the same order: (numel, 1)."""
    one, other = _order(shape, strides), _order(shape, turned)
    if one is None or other is None:
        return None
    same = 0
    while same < len(one) and one[same] == other[same]:
        same += 1
    left, right = one[same:], other[same:]
    for cut in range(1, len(left)):
        if right == left[cut:] + left[:cut]:
            outer, inner = (math.prod(shape[d] for d in dims) for dims in (left[:cut], left[cut:]))
            return outer, inner
    return None if left else (math.prod(shape), 1)


def _begin_well(tensors: Sequence[Tensor]) -> bool:
    """Whether they begin at multiples of 16 bytes and have memory, if they have elements."""
    addresses = list(map(Tensor.data_ptr, tensors))
    if functools.reduce(operator.or_, addresses) % ALIGN_BYTES:
        return False
    return all(x.numel() == 0 for x, address in zip(tensors, addresses, strict=True) if not address)
