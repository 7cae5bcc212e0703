"""`autopar::peer_copy_` and `autopar::peer_wait_`: ranks write into each other's memory.

A place is memory of this rank that the n ranks of its group write into, each into its own part.

    peer_copy_(value, place, scatter, own)    starts: to rank j goes part j of value (scatter), or
                                              all of it; what comes from rank j becomes part j of
                                              place
    peer_wait_(place, value)                  place may be read, and value freed

Shapes: value any, contiguous; place [P], of which the first n * m elements are used where own is
set, m being those that one rank sends; otherwise what a rank would send to itself is left out, and
the parts of the n - 1 others follow one another. A value that goes whole to all ranks, its own too,
may be of another type than the place: it is cast. All ranks of a group make the same calls in one
order. A call starts when all ranks have come to it, so that none writes over what another one has
still to read; what is cast is so before, in the part of this rank, which no other one touches.

Who keeps the memory of a place registers it with `keep`.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from autopar.errors import InternalError
from autopar.ops.library import LIBRARY, define

define("peer_copy_(Tensor value, Tensor(a!) place, bool scatter, bool own) -> ()")
define("peer_wait_(Tensor(a!) place, Tensor value) -> ()")

PEER_COPY = torch.ops.autopar.peer_copy_.default
PEER_WAIT = torch.ops.autopar.peer_wait_.default


class PeerMemory(Protocol):
    """Memory of the ranks of one group, alike on each of them."""

    def copy(self, value: Tensor, place: Tensor, *, scatter: bool, own: bool) -> None: ...

    def wait(self, place: Tensor) -> None: ...


def part_of_place(source: int, target: int, *, own: bool) -> int:
    """Which part of its place rank `target` gets from rank `source`."""
    return source if own else source - (source > target)


def spoil(place: Tensor) -> None:
    """Fills a place with what is no number in floating point types, and -1 in others."""
    place.view(torch.uint8).fill_(0xFF)


_KEPT: weakref.WeakValueDictionary[int, PeerMemory] = weakref.WeakValueDictionary()


def keep(memory: Tensor, owner: PeerMemory) -> None:
    """Views of this memory are places of `owner`, as long as that exists."""
    _KEPT[memory.untyped_storage().data_ptr()] = owner


def _owner(place: Tensor) -> PeerMemory:
    try:
        return _KEPT[place.untyped_storage().data_ptr()]
    except KeyError:
        raise InternalError("a place that no rank but this one knows") from None


def _copy(value: Tensor, place: Tensor, scatter: bool, own: bool) -> None:
    if not value.is_contiguous():
        raise InternalError(f"sends a value with strides {value.stride()}: it must be contiguous")
    if value.dtype is not place.dtype and (scatter or not own):
        raise InternalError(f"sends {value.dtype} into a place of {place.dtype}")
    _owner(place).copy(value.reshape(-1), place, scatter=scatter, own=own)


def _wait(place: Tensor, value: Tensor) -> None:
    del value
    _owner(place).wait(place)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("peer_copy_", _copy, _key)
    LIBRARY.impl("peer_wait_", _wait, _key)
torch.library.register_fake(
    "autopar::peer_copy_", lambda value, place, scatter, own: None, lib=LIBRARY
)
torch.library.register_fake("autopar::peer_wait_", lambda place, value: None, lib=LIBRARY)
