"""Values between stages of a real job: tiles from rank to rank."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import InternalError
from autopar.lowering.lower import LoweredStage
from autopar.lowering.transfer import Tile, Transfer
from autopar.runtime.interpreter import Shards
from autopar.runtime.routes import Route, box_of, cut_tile, join_tiles, tile_shape


def connect_ends(
    rank: int, device: torch.device, group: dist.ProcessGroup, ends: Sequence[tuple[int, int]]
) -> None:
    """Each sender meets each receiver once. NCCL connects two ranks at their first message, and
    lets the host of the first one wait for the other: in a step, where each waits for its own turn,
    two that come to two channels in different orders would wait for ever."""
    sent, got = torch.zeros(2, device=device)
    posts = [dist.P2POp(dist.isend, sent, r, group) for s, r in ends if s == rank]
    posts += [dist.P2POp(dist.irecv, got, s, group) for s, r in ends if r == rank]
    _finish(dist.batch_isend_irecv(posts) if posts else [])


class _Post(NamedTuple):
    """A tile on its way to another rank, or from one."""

    peer: int
    part: Tensor
    sending: bool


class _Arrival(NamedTuple):
    """A value between two stages of one worker: the tiles of this rank, there once works are
    done."""

    tiles: list[tuple[Tile, Tensor]]
    works: list[dist.Work]


def _finish(works: list[dist.Work]) -> None:
    """Waits for each, once: gloo would wait for another message. The list is empty afterwards, for
    all that share it."""
    while works:
        works.pop().wait()


class ProcessTransport:
    """Tiles between the ranks of two stages, in the fixed order of the routes.

    Sends return at once; their buffers live until they are done. CUDA tiles of one call and one
    pair of stages travel as one NCCL group call. Between two stages of one worker all ranks send
    and receive in that call, as neither side could wait for the other's.
    """

    def __init__(
        self,
        stages: Sequence[LoweredStage],
        me: int,
        groups: Mapping[tuple[int, int], dist.ProcessGroup],
        device: torch.device,
    ) -> None:
        """me: the global rank. groups: by channel, (source stage, target stage)."""
        self._stages = stages
        self._me = me
        self._groups = groups
        self._device = device
        self._pending: list[tuple[list[dist.Work], list[Tensor]]] = []
        self._tags: defaultdict[tuple[tuple[int, int], int, bool], int] = defaultdict(int)
        self._arrivals: defaultdict[tuple[int, int, str], deque[_Arrival]] = defaultdict(deque)

    def send(self, transfers: Route, values: Sequence[Shards]) -> None:
        self._reap()
        posts: defaultdict[tuple[int, int], list[_Post]] = defaultdict(list)
        works: defaultdict[tuple[int, int], list[dist.Work]] = defaultdict(list)
        for transfer, (shard,) in zip(transfers, values, strict=True):
            source, target = self._ends(transfer)
            channel = (source.index, target.index)
            own: list[tuple[Tile, Tensor]] = []
            for tile in transfer.tiles:
                sender, receiver = source.devices[tile.source], target.devices[tile.target]
                if sender == self._me:
                    part = cut_tile(shard, transfer, source.mesh, tile).contiguous()
                    if receiver == self._me:
                        own.append((tile, part))
                    else:
                        posts[channel].append(_Post(receiver, part, True))
                elif receiver == self._me:
                    part = self._buffer(transfer, tile)
                    posts[channel].append(_Post(sender, part, False))
                    own.append((tile, part))
            if source.devices == target.devices:
                self._arrivals[box_of(transfer)].append(_Arrival(own, works[channel]))
        for channel, queue in posts.items():
            works[channel] += self._start(channel, queue)
            self._pending.append((works[channel], [post.part for post in queue]))

    def receive(self, transfers: Route) -> list[Shards]:
        arrivals: list[_Arrival] = []
        posts: defaultdict[tuple[int, int], list[_Post]] = defaultdict(list)
        works: defaultdict[tuple[int, int], list[dist.Work]] = defaultdict(list)
        for transfer in transfers:
            source, target = self._ends(transfer)
            channel = (source.index, target.index)
            if source.devices == target.devices:
                arrivals.append(self._arrivals[box_of(transfer)].popleft())
                continue
            tiles = [t for t in transfer.tiles if target.devices[t.target] == self._me]
            mine = [(tile, self._buffer(transfer, tile)) for tile in tiles]
            posts[channel] += [_Post(source.devices[t.source], part, False) for t, part in mine]
            arrivals.append(_Arrival(mine, works[channel]))
        for channel, queue in posts.items():
            works[channel] += self._start(channel, queue)
        for arrival in arrivals:
            _finish(arrival.works)
        return [
            [join_tiles(transfer, self._ends(transfer)[1].mesh, arrival.tiles, self._device)]
            for transfer, arrival in zip(transfers, arrivals, strict=True)
        ]

    def _ends(self, transfer: Transfer) -> tuple[LoweredStage, LoweredStage]:
        return self._stages[transfer.source_stage], self._stages[transfer.target_stage]

    def flush(self) -> None:
        """Waits until every value that was sent has left."""
        for works, _ in self._pending:
            _finish(works)
        self._pending.clear()

    def _buffer(self, transfer: Transfer, tile: Tile) -> Tensor:
        return torch.empty(tile_shape(tile), dtype=transfer.meta.dtype, device=self._device)

    def _start(self, channel: tuple[int, int], posts: Sequence[_Post]) -> list[dist.Work]:
        if self._device.type == "cuda":
            group = self._groups[channel]
            operations = [
                dist.P2POp(dist.isend if post.sending else dist.irecv, post.part, post.peer, group)
                for post in posts
            ]
            works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
            return works
        return [self._start_one(channel, post) for post in posts]

    def _start_one(self, channel: tuple[int, int], post: _Post) -> dist.Work:
        """Both ends number the tiles between two ranks, per channel."""
        group, (peer, part, sending) = self._groups[channel], post
        self._tags[channel, peer, sending] += 1
        tag = self._tags[channel, peer, sending] % (1 << 20)
        if sending:
            work = dist.isend(part, group=group, tag=tag, dst=peer)
        else:
            work = dist.irecv(part, group=group, tag=tag, src=peer)
        if work is None:
            raise InternalError("this rank is not in the group of a transfer that it takes part in")
        return work

    def _reap(self) -> None:
        self._pending = [
            (works, parts)
            for works, parts in self._pending
            if not all(work.is_completed() for work in works)
        ]
