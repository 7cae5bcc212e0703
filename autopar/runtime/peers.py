"""Memory that the ranks of a process group write into: what `autopar::peer_copy_` works on.

On GPUs of one host it is symmetric memory, and copies are made by copy engines on a stream of their
own. No kernel waits: ranks meet by words in that memory, which streams write and wait for (stream
memory operations of the CUDA driver).

    peer_copy_    cast this rank's part, on the program's stream: nobody else reads or writes it;
                  tell the others that this rank is here, wait for all; copy; tell that it is done,
                  wait for all
    peer_wait_    the stream of the program waits for that

A word is set back by the stream that has waited for it, and set again only by a rank that has been
told something since; so that a CUDA graph can repeat all of it. On CPUs the same calls are
collectives of gloo, which is what they are tested by.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as bindings
from torch.distributed import _symmetric_memory as symmetric

from autopar.compile.peers import Peers, Place
from autopar.errors import InternalError, RuntimeFailure
from autopar.ops.peers import keep, part_of_place, spoil
from autopar.runtime.comm import World

_LOG = logging.getLogger(__name__)

_ALIGNMENT = 512  # bytes, of a place
_WORD = 4  # bytes
_HERE, _DONE = 0, 1  # what a rank tells: one word each, for each rank that is told
_PATIENCE_S, _LET_GO_S = 1.0, 5.0


_NUMBERS = itertools.count()  # all ranks make them in one order


class PeerGroups:
    """The groups of this rank in which ranks write into each other's memory, and that memory."""

    def __init__(self, world: World, names: Sequence[str]) -> None:
        """names: of the process groups. All ranks of each group call it in one order."""
        self._world, self._number = world, next(_NUMBERS)
        self._groups = {name: bindings._resolve_process_group(cast(Any, name)) for name in names}
        cuda = world.device.type == "cuda"
        able = _is_reachable if cuda else lambda *_: True
        self.peers: Mapping[str, Peers] = {
            name: Peers(group.rank(), group.size())
            for name, group in self._groups.items()
            if group.size() > 1 and able(world, group)
        }

    def agree(self, wanted: bool) -> bool:
        """What the first rank to ask wants, on all: ranks with padded shards count other operators,
        by which it is decided whether there are copies."""
        return bool(self._world.agree(f"copies/{self._number}", lambda: int(wanted)))

    def allocate(self, places: Sequence[Place], numbers: Sequence[int] = ()) -> list[Tensor]:
        """The memory of the places, in their order. All ranks of the groups call it with the same
        ones, and the same numbers of the places that copies go to; it lasts as long as the
        tensors."""
        found: dict[int, Tensor] = {}
        for name in dict.fromkeys(place.group for place in places):
            own = [i for i, place in enumerate(places) if place.group == name]
            chosen = [places[i] for i in own]
            _check_alike(self._groups[name], chosen, numbers, self._world.device)
            cuda = self._world.device.type == "cuda"
            made = _CopyEngines if cuda else _Collectives
            memory = made(self._groups[name], _nbytes(chosen), self._world.device)
            if isinstance(memory, _CopyEngines):
                self._world.release_first(memory)
            found.update(zip(own, _cut(memory.memory, chosen, memory), strict=True))
        return [found[i] for i in range(len(places))]


def held_bytes() -> int:
    """Of this process: memory of places, which torch.cuda's statistics do not know."""
    return sum(engines.memory.numel() for engines in _ALIVE)


def _nbytes(places: Sequence[Place]) -> int:
    return sum(_padded(place) for place in places)


def _padded(place: Place) -> int:
    return math.ceil(place.nbytes / _ALIGNMENT) * _ALIGNMENT


def _cut(memory: Tensor, places: Sequence[Place], owner: _Memory) -> list[Tensor]:
    """Views of bytes as places, which keep their owner."""
    found, first = [], 0
    for place in places:
        part = memory[first : first + place.nbytes].view(place.dtype)
        part._autopar_owner = owner  # type: ignore[attr-defined]
        found.append(part)
        first += _padded(place)
    return found


def _check_alike(
    group: dist.ProcessGroup,
    places: Sequence[Place],
    numbers: Sequence[int],
    device: torch.device,
) -> None:
    """InternalError unless all ranks want the same places, for the same copies: they write by their
    own offsets."""
    digest = 0
    for value in (*(place.numel * 31 + place.dtype.itemsize for place in places), *numbers):
        digest = (digest * 1_000_003 + value) % (1 << 52)
    ends = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    if int(ends[0]) != -int(ends[1]):
        raise InternalError(f"ranks want different places: {list(places)} on this one")


class _Memory(ABC):
    """Equal parts of `memory` on each rank of a group. memory: bytes."""

    def __init__(self, group: dist.ProcessGroup, memory: Tensor) -> None:
        self.memory, self._group = memory, group
        self._rank, self._size = group.rank(), group.size()
        keep(memory, self)

    @abstractmethod
    def copy(self, value: Tensor, place: Tensor, *, scatter: bool, own: bool) -> None: ...

    @abstractmethod
    def wait(self, place: Tensor) -> None: ...


class _Collectives(_Memory):
    """The same by collectives. A place holds nonsense until it was waited for, so that who reads it
    too early, or when it is written again, is found out."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        super().__init__(group, torch.empty(nbytes, dtype=torch.uint8, device=device))
        self._travelling: dict[int, Tensor] = {}

    def copy(self, value: Tensor, place: Tensor, *, scatter: bool, own: bool) -> None:
        sent = value.numel() // (self._size if scatter else 1)
        value = value.to(place.dtype)
        received = value.new_empty(self._size * sent)
        if scatter:
            dist.all_to_all_single(received, value, group=self._group)
        else:
            dist.all_gather(list(received.chunk(self._size)), value, group=self._group)
        parts = list(received.view(self._size, sent))
        if not own:
            del parts[self._rank]
        self._travelling[place.data_ptr()] = torch.cat(parts)
        spoil(place)

    def wait(self, place: Tensor) -> None:
        arrived = self._travelling.pop(place.data_ptr())
        place[: arrived.numel()] = arrived


_ALIVE: weakref.WeakSet[_CopyEngines] = weakref.WeakSet()


class _CopyEngines(_Memory):
    """Symmetric memory. The words by which ranks meet lie behind the places: for each of what is
    told, one for each rank that tells it."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        words = 2 * group.size() * _WORD
        torch.cuda.empty_cache()  # for what torch's allocator does not give
        whole = symmetric.empty(nbytes + words, dtype=torch.uint8, device=device)
        self._handle: Any = symmetric.rendezvous(whole, group)
        super().__init__(group, whole)
        whole[nbytes:].zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])  # no rank is told before all words are zero
        self._words = nbytes
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._used = {self._stream}  # on which something may wait: a graph does on the program's
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._views: dict[tuple[int, int, torch.dtype, int], Tensor] = {}
        self._meetings = [self._meeting(told) for told in (_HERE, _DONE)]
        _ALIVE.add(self)

    def copy(self, value: Tensor, place: Tensor, *, scatter: bool, own: bool) -> None:
        sent = value.numel() // (self._size if scatter else 1)
        current = torch.cuda.current_stream(self._device)
        self._used.add(current)
        nearest = 0 if own else 1
        if value.dtype is not place.dtype:  # this rank's part is made where it lies
            value = self._view(self._rank, place, self._rank * sent, sent).copy_(value)
            nearest = 1
        self._stream.wait_stream(current)
        self._meet(_HERE)
        with torch.cuda.stream(self._stream):
            for step in range(nearest, self._size):
                target = (self._rank + step) % self._size
                first = target * sent if scatter else 0
                part = part_of_place(self._rank, target, own=own)
                view = self._view(target, place, part * sent, sent)
                view.copy_(value[first : first + sent], non_blocking=True)
        self._meet(_DONE)
        arrived = self._arrived.setdefault(place.data_ptr(), torch.cuda.Event())
        arrived.record(self._stream)

    def wait(self, place: Tensor) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[place.data_ptr()])

    def release(self) -> None:
        """Lets go what still waits for other ranks, who may have failed, after a while in which
        what does not wait for ever has ended."""
        words, helper = self.memory[self._words :].view(torch.int32), torch.cuda.Stream()
        started = time.monotonic()
        while not all(stream.query() for stream in self._used):
            waited = time.monotonic() - started
            if waited > _LET_GO_S:
                return
            if waited > _PATIENCE_S:
                with torch.cuda.stream(helper):
                    words.fill_(1)
                helper.synchronize()
            time.sleep(1e-3)

    def _view(self, rank: int, place: Tensor, first: int, numel: int) -> Tensor:
        """Part of a place on another rank. first: in elements."""
        offset = place.data_ptr() - self.memory.data_ptr()
        offset = offset // place.itemsize + first
        key = rank, offset, place.dtype, numel
        if key not in self._views:
            self._views[key] = self._handle.get_buffer(rank, (numel,), place.dtype, offset)
        return self._views[key]

    def _meeting(self, told: int) -> Any:
        """What a stream does to meet the others: tells each, waits for each, sets back."""
        bases: list[int] = self._handle.buffer_ptrs
        others = [rank for rank in range(self._size) if rank != self._rank]

        def word(rank: int, teller: int) -> int:
            return bases[rank] + self._words + (told * self._size + teller) * _WORD

        steps = [(_WRITE, word(rank, self._rank), 1) for rank in others]
        for rank in others:
            mine = word(self._rank, rank)
            steps += [(_WAIT, mine, 1), (_WRITE, mine, 0)]
        return (_MemoryOperation * len(steps))(*(_MemoryOperation(*s) for s in steps))

    def _meet(self, told: int) -> None:
        operations = self._meetings[told]
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        _check(_driver().cuStreamBatchMemOp_v2(stream, len(operations), operations, 0))


def _is_reachable(world: World, group: dist.ProcessGroup) -> bool:
    """Whether all ranks of a group of GPUs can write into each other's memory: asked on each rank,
    answered alike on all."""
    ranks = dist.get_process_group_ranks(group)
    hosts = {rank // world.local_size for rank in ranks}
    here, count = world.device.index, torch.cuda.device_count()
    others = {rank % world.local_size for rank in ranks} - {world.rank % world.local_size}
    able = len(hosts) == 1 and all(
        other < count and torch.cuda.can_device_access_peer(here, other) for other in others
    )
    if not _agree(able, group, world.device):
        return False
    try:
        _CopyEngines(group, _ALIGNMENT, world.device)
    except (RuntimeError, OSError, AttributeError) as error:
        _LOG.warning("collectives go through NCCL, as symmetric memory failed: %s", error)
        able = False
    return _agree(able, group, world.device)


def _agree(able: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    answer = torch.tensor(int(able), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN, group=group)
    return bool(answer)


# CUstreamBatchMemOpParams of cuda.h, of which a union of 48 bytes is the array's element.
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, .._WRITE_VALUE_32; flags 0: >=, with a fence


class _MemoryOperation(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_uint64),  # an enumeration, padded
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    )


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuStreamBatchMemOp_v2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_uint,
    ]
    return library


def _check(status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeFailure(f"the CUDA driver refuses a memory operation: {text.value!r}")
