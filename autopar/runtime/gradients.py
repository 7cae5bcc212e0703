"""Gradients at rest: DTensors on which optimizers that take lists of tensors do no dispatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


class Gradient(DTensor):
    """A DTensor. An operator that updates lists of tensors element by element, such as the step of
    a fused optimizer, runs on the shards at once where they are laid out alike; DTensor would
    derive the placements of every tensor anew, in tens of microseconds each."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        keywords = dict(kwargs or {})
        if _is_update(func, args, keywords):
            return func(*map(_shards, args), **{k: _shards(arg) for k, arg in keywords.items()})
        args, keywords = pytree.tree_map_only(Gradient, _plain, (args, keywords))
        return func(*args, **keywords)


def as_gradient(local: Tensor, parameter: Tensor) -> Tensor:
    """A local gradient in the form of its parameter. Pre: it has the shape of its shard."""
    if not isinstance(parameter, DTensor):
        return local
    # DTensor.__init__ does nothing, at the price of all the rest
    gradient: Tensor = Gradient.__new__(Gradient, local, parameter._spec, requires_grad=False)
    return gradient


def _is_update(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether shards of what is updated together lie in the same places. O(tensors)."""
    name: str = func._schema.name
    if not (name.startswith(("aten::_fused_", "aten::_foreach_")) and name.endswith("_")):
        return False
    values = [*args, *kwargs.values()]
    lists = [value for value in values if isinstance(value, (list, tuple)) and value]
    alone = any(isinstance(value, DTensor) for value in values)
    return not alone and all(map(_is_alike, zip(*lists, strict=False)))


def _is_alike(together: Sequence[Any]) -> bool:
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


def _shards(arg: Any) -> Any:
    if not isinstance(arg, (list, tuple)):
        return arg
    return [value._local_tensor if isinstance(value, DTensor) else value for value in arg]


def _plain(gradient: Gradient) -> DTensor:
    return DTensor(gradient._local_tensor, gradient._spec, requires_grad=gradient.requires_grad)
