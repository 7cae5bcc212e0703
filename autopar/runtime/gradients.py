"""Gradients at rest: DTensors on which optimizers that take lists of tensors do no dispatch.

Such an update runs on the shards at once where they are laid out alike; DTensor would derive the
placements of every tensor anew, in tens of microseconds each. A step of
`torch.optim.AdamW(.., fused=True)` is that of `ops.adamw` for the shards that it fits. Gradients
see the call by `__torch_function__`: torch 2.11 does not ask a DTensor's `__torch_dispatch__`.

A gradient may have been made in a narrower type than its parameter's, and in other strides, and a
part of it that came from another rank may still have to be added. It is brought into the form of
its parameter when somebody asks for its local tensor; that step of AdamW does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.errors import InternalError
from autopar.ops import adamw
from autopar.ops.wide_sum import add_wide

_LISTED = frozenset(
    function
    for name, function in vars(torch).items()
    if name.startswith(("_fused_", "_foreach_")) and name.endswith("_")
)
"""Update lists of tensors element by element."""

_NUM_LISTS = 6  # of AdamW


class Made(NamedTuple):
    """A local gradient as it was made. addend: what is to be added, of its shape, type and strides,
    in memory that the next step overwrites; stream: of the step, where that is on a GPU."""

    value: Tensor
    addend: Tensor | None = None
    stream: torch.cuda.Stream | None = None


class Gradient(DTensor):
    """A DTensor in all else."""

    # As it was made, and the strides that its local tensor gets; nothing once that is there.
    _made: tuple[Made, tuple[int, ...]] | None = None

    def __getattr__(self, name: str) -> Any:
        """The local tensor when it is asked for first. Everything that reads a DTensor's values or
        writes into them asks for it. (Called for attributes that are not there.)"""
        if name != "_local_tensor" or self._made is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        (narrow, addend, stream), strides = self._made
        with torch.inference_mode(mode=False), torch.no_grad():
            local = torch.empty_strided(
                narrow.shape, strides, dtype=self.dtype, device=narrow.device
            )
            if addend is None:
                self._local_tensor = local.copy_(narrow)
            else:
                self._local_tensor = add_wide(narrow, addend, local)
        if narrow.is_cuda:  # its memory is that of the stream of the step
            current = torch.cuda.current_stream(narrow.device)
            narrow.record_stream(current)
            if stream is not None and stream != current:
                stream.wait_stream(current)
        self._made = None
        return local

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        local = self._local_tensor.clone()
        memo[id(self)] = copied = Gradient.__new__(Gradient, local, self._spec, requires_grad=False)
        return copied

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
            options = {key: _shards(arg) for key, arg in keywords.items()}
            if func == torch._fused_adamw_ and _is_usual(args, options):
                return _adamw(args, options)
            return func(*map(_shards, args), **options)
        return torch._C._disabled_torch_function_impl(func, types, args, keywords)


def as_gradient(local: Tensor, parameter: Tensor, addend: Tensor | None = None) -> Tensor:
    """A local gradient in the form of its parameter. addend: as `Made`. Pre: it has the shape of
    its shard; that of a plain tensor has its type, too, and no addend."""
    if not isinstance(parameter, DTensor):
        if addend is not None:
            raise InternalError("a gradient of one device has an addend")
        return local
    shard = parameter._local_tensor
    later = local.dtype is not shard.dtype or addend is not None
    # DTensor.__init__ does nothing, at the price of all the rest
    gradient: Any = Gradient.__new__(
        Gradient, shard if later else local, parameter._spec, requires_grad=False
    )
    if later:
        on_gpu = addend is not None and addend.is_cuda
        stream = torch.cuda.current_stream(local.device) if on_gpu else None
        gradient._made = (Made(local, addend, stream), shard.stride())
        del gradient._local_tensor
    made: Tensor = gradient
    return made


def is_open(gradient: Tensor) -> bool:
    """Whether something is still to be added to it."""
    made = gradient._made if isinstance(gradient, Gradient) else None
    return made is not None and made[0].addend is not None


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
    parameters, given, averages, squares, _, steps = lists
    made = list(map(as_made, given))
    gradients, addends = [m.value for m in made], [m.addend for m in made]
    columns = (_shards(parameters), gradients, *map(_shards, (averages, squares, steps)), addends)
    names = ("lr", "beta1", "beta2", "weight_decay", "eps")
    rates = {name: options[name] for name in names}
    if adamw.fits(*columns):
        adamw.adamw(*columns, **rates)
        return
    ours: list[Sequence[Any]] = []
    others: list[Sequence[Tensor]] = []
    for row, gradient in zip(zip(*columns, strict=True), given, strict=True):
        if adamw.fits(*([x] for x in row)):
            ours.append(row)
        else:
            others.append((row[0], *_shards([gradient]), *row[2:5]))
    if ours:
        adamw.adamw(*map(list, zip(*ours, strict=True)), **rates)
    if others:
        left = [list(column) for column in zip(*others, strict=True)]
        torch._fused_adamw_(*left[:4], [], left[4], **options)  # type: ignore[call-overload]


def as_made(gradient: Any) -> Made:
    """This rank's part of a gradient, in the type and strides in which it was made and in the two
    parts of its sum, if nobody has asked for it in another way."""
    if isinstance(gradient, Gradient) and gradient._made is not None:
        return gradient._made[0]
    return Made(gradient._local_tensor if isinstance(gradient, DTensor) else gradient)


def _shards(arg: Any) -> Any:
    if not isinstance(arg, (list, tuple)):
        return arg
    return [value._local_tensor if isinstance(value, DTensor) else value for value in arg]
