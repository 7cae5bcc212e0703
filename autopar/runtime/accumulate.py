"""Gradients summed over microbatches, in place, in the layout in which backward makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from autopar.runtime.interpreter import Shards


class Accumulator:
    """Sums of gradients by name. The first microbatch's tensors become the sums where they are this
    object's alone; one that shares its storage with another value of the program is copied."""

    def __init__(self) -> None:
        self._sums: dict[str, Shards] = {}

    def add(
        self,
        outputs: Mapping[str, Shards],
        names: Sequence[str],
        *,
        reused: bool,
        shared: Collection[int] = (),
    ) -> None:
        """outputs: all that a program made. reused: other microbatches follow. shared: `storages`
        of what others may still read."""
        if self._sums:
            for name in names:
                for total, gradient in zip(self._sums[name], outputs[name], strict=True):
                    total.add_(gradient)
            return
        if not reused:
            self._sums = {name: outputs[name] for name in names}
            return
        self._sums = own_copies(outputs, names, shared)

    def take(self) -> dict[str, Shards]:
        """The sums, which are then the caller's."""
        sums, self._sums = self._sums, {}
        return sums


def own_copies(
    values: Mapping[str, Shards],
    names: Sequence[str] | None = None,
    shared: Collection[int] = (),
) -> dict[str, Shards]:
    """The named values, all by default, each in memory that no other value sees, nor anybody else
    (shared: `storages`): copied only where it is not so already."""
    owners = Counter(_storage(t) for shards in values.values() for t in shards)
    owners.update(shared)
    return {
        name: [t if _is_own(t, owners) else t.clone() for t in values[name]]
        for name in (values if names is None else names)
    }


def own_results(values: Mapping[str, Shards], addends: Collection[str]) -> dict[str, Shards]:
    """All of them, in `own_copies` but for those to which something is still to be added: they are
    read once, or become a sum elsewhere."""
    settled = [name for name in values if name not in addends]
    return {**values, **own_copies(values, settled)}


def storages(values: Mapping[str, Shards]) -> frozenset[int]:
    """The memory that values live in, without keeping it. What reuses it later only looks
    shared."""
    return frozenset(_storage(t) for shards in values.values() for t in shards)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_own(tensor: Tensor, owners: Counter[int]) -> bool:
    """Whether nothing else can see an addition in place. A view of a larger storage may be of a
    value that is kept elsewhere, such as a saved one."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return whole and dense and owners[_storage(tensor)] == 1
