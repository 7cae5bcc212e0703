"""Gradients at rest: DTensors on which optimizers that take lists of tensors do no dispatch.

Such an update runs on the shards at once where they are laid out alike; DTensor would derive the
placements of every tensor anew, in tens of microseconds each. A step of
`torch.optim.AdamW(.., fused=True)` is that of `ops.adamw` for the shards that it fits. Gradients
see the call by `__torch_function__`: torch 2.11 does not ask a DTensor's `__torch_dispatch__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.ops import adamw

_LISTED = frozenset(
    function
    for name, function in vars(torch).items()
    if name.startswith(("_fused_", "_foreach_")) and name.endswith("_")
)
"""Update lists of tensors element by element."""

_NUM_LISTS = 6  # of AdamW


class Gradient(DTensor):
    """A DTensor in all else."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _LISTED and not torch.is_grad_enabled() and _is_alike(args, keywords):
            local = [_shards(arg) for arg in args]
            options = {key: _shards(arg) for key, arg in keywords.items()}
            if func == torch._fused_adamw_ and _is_usual(local, options):
                return _adamw(local, options)
            return func(*local, **options)
        return torch._C._disabled_torch_function_impl(func, types, args, keywords)


def as_gradient(local: Tensor, parameter: Tensor) -> Tensor:
    """A local gradient in the form of its parameter. Pre: it has the shape of its shard."""
    if not isinstance(parameter, DTensor):
        return local
    # DTensor.__init__ does nothing, at the price of all the rest
    gradient: Tensor = Gradient.__new__(Gradient, local, parameter._spec, requires_grad=False)
    return gradient


def _is_alike(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether shards of what is updated together lie in the same places. O(tensors)."""
    values = [*args, *kwargs.values()]
    lists = [value for value in values if isinstance(value, (list, tuple)) and value]
    alone = any(isinstance(value, DTensor) for value in values)
    return not alone and all(map(_lie_alike, zip(*lists, strict=False)))


def _lie_alike(together: Sequence[Any]) -> bool:
    """Whether these are DTensors of one shape and layout, without pending sums, and scalars."""
    first = None
    for value in together:
        if not isinstance(value, DTensor):
            if isinstance(value, Tensor) and value.ndim:
                return False
            continue
        spec = value._spec
        if first is None:
            first = spec
        elif (
            spec.placements != first.placements
            or spec.mesh != first.mesh
            or spec.shape != first.shape
        ):
            return False
    return first is not None and not any(p.is_partial() for p in first.placements)


def _is_usual(lists: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a step of AdamW is as `ops.adamw` makes it."""
    if len(lists) != _NUM_LISTS or lists[4] or isinstance(options["lr"], Tensor):
        return False
    scaled = any(options.get(name) is not None for name in ("grad_scale", "found_inf"))
    return not (scaled or options["amsgrad"] or options["maximize"])


def _adamw(lists: Sequence[Any], options: Mapping[str, Any]) -> None:
    """By our kernel what it takes, by torch's the rest. Decided for each parameter: ranks have
    other shards, but what is replicated has to stay the same on all of them."""
    parameters, gradients, averages, squares, _, steps = lists
    columns = (parameters, gradients, averages, squares, steps)
    names = ("lr", "beta1", "beta2", "weight_decay", "eps")
    rates = {name: options[name] for name in names}
    if adamw.fits(*columns):
        adamw.adamw(*columns, **rates)
        return
    ours: list[Sequence[Tensor]] = []
    others: list[Sequence[Tensor]] = []
    for row in zip(*columns, strict=True):
        (ours if adamw.fits(*([x] for x in row)) else others).append(row)
    if ours:
        adamw.adamw(*map(list, zip(*ours, strict=True)), **rates)
    if others:
        left = [list(column) for column in zip(*others, strict=True)]
        torch._fused_adamw_(*left[:4], [], left[4], **options)  # type: ignore[call-overload]


def _shards(arg: Any) -> Any:
    if not isinstance(arg, (list, tuple)):
        return arg
    return [value._local_tensor if isinstance(value, DTensor) else value for value in arg]
