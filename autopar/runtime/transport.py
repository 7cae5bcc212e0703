"""Values between stages of a real job: tiles from rank to rank."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.actions import Action
from autopar.errors import InternalError
from autopar.lowering.lower import LoweredPlan, LoweredStage
from autopar.lowering.transfer import Tile, Transfer
from autopar.runtime.interpreter import Shards
from autopar.runtime.routes import (
    Channel,
    Message,
    Route,
    box_of,
    cut_tile,
    join_tiles,
    message_for,
    message_order,
    tile_shape,
)


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
    """Tiles between the ranks of two workers, in the order of `routes.message_order`.

    Sends return at once; their buffers live until they are done, and until it is their turn: NCCL
    lets a message that is sent before its turn wait on the GPU, in a kernel, and too many of
    these may leave no room for what they wait for. CUDA tiles of one message travel as one NCCL
    group call. Between two stages of one worker all ranks send and receive in that call, as neither
    side could wait for the other's.
    """

    def __init__(
        self,
        lowered: LoweredPlan,
        me: int,
        groups: Mapping[Channel, dist.ProcessGroup],
        device: torch.device,
    ) -> None:
        """me: the global rank."""
        self._stages = lowered.stages
        self._orders = {t: message_order(lowered, me, trains=t) for t in (False, True)}
        self._expected: dict[Channel, deque[Message]] = {}
        self._waiting: dict[Message, list[_Post]] = {}
        self._me = me
        self._groups = groups
        self._device = device
        self._pending: list[tuple[list[dist.Work], list[Tensor]]] = []
        self._tags: defaultdict[tuple[Channel, int, bool], int] = defaultdict(int)
        self._arrivals: defaultdict[tuple[int, int, str], deque[_Arrival]] = defaultdict(deque)

    def begin(self, *, trains: bool) -> None:
        if self._waiting:
            raise InternalError(f"values of the step before were not sent: {list(self._waiting)}")
        self._expected = {c: deque(order) for c, order in self._orders[trains].items()}

    def send(self, transfers: Route, values: Sequence[Shards], action: Action | None) -> None:
        self._reap()
        inside: list[_Post] = []
        works: list[dist.Work] = []
        for transfer, (shard,) in zip(transfers, values, strict=True):
            source, target = self._ends(transfer)
            own: list[tuple[Tile, Tensor]] = []
            for tile in transfer.tiles:
                sender, receiver = source.devices[tile.source], target.devices[tile.target]
                if sender == self._me:
                    part = cut_tile(shard, transfer, source.mesh, tile).contiguous()
                    if receiver == self._me:
                        own.append((tile, part))
                    elif source.devices == target.devices:
                        inside.append(_Post(receiver, part, True))
                    else:
                        message = message_for(transfer, action)
                        self._waiting.setdefault(message, []).append(_Post(receiver, part, True))
                elif receiver == self._me:
                    part = self._buffer(transfer, tile)
                    inside.append(_Post(sender, part, False))
                    own.append((tile, part))
            if source.devices == target.devices:
                self._arrivals[box_of(transfer)].append(_Arrival(own, works))
        if inside:
            devices = self._stages[transfers[0].source_stage].devices
            self._post((devices, devices), inside, works)
        self._send_what_is_due()

    def _send_what_is_due(self) -> None:
        """Messages in their turn, as far as they are there."""
        for channel, order in self._expected.items():
            while order and order[0] in self._waiting:
                self._post(channel, self._waiting.pop(order.popleft()), [])

    def _post(self, channel: Channel, posts: Sequence[_Post], works: list[dist.Work]) -> None:
        """Adds to works. What is posted lives until they are done."""
        works += self._start(channel, posts)
        self._pending.append((works, [post.part for post in posts]))

    def receive(self, transfers: Route, action: Action | None) -> list[Shards]:
        arrivals: list[_Arrival] = []
        posts: defaultdict[Message, list[_Post]] = defaultdict(list)
        works: defaultdict[Message, list[dist.Work]] = defaultdict(list)
        for transfer in transfers:
            source, target = self._ends(transfer)
            if source.devices == target.devices:
                arrivals.append(self._arrivals[box_of(transfer)].popleft())
                continue
            message = message_for(transfer, action)
            tiles = [t for t in transfer.tiles if target.devices[t.target] == self._me]
            mine = [(tile, self._buffer(transfer, tile)) for tile in tiles]
            posts[message] += [_Post(source.devices[t.source], part, False) for t, part in mine]
            arrivals.append(_Arrival(mine, works[message]))
        for message in sorted(posts, key=lambda message: message.source_stage):
            ends = (self._stages[i].devices for i in (message.source_stage, message.target_stage))
            source_devices, target_devices = ends
            works[message] += self._start((source_devices, target_devices), posts[message])
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
        if self._waiting:
            raise InternalError(f"values that nobody asked for: {list(self._waiting)}")
        for works, _ in self._pending:
            _finish(works)
        self._pending.clear()

    def _buffer(self, transfer: Transfer, tile: Tile) -> Tensor:
        return torch.empty(tile_shape(tile), dtype=transfer.meta.dtype, device=self._device)

    def _start(self, channel: Channel, posts: Sequence[_Post]) -> list[dist.Work]:
        if self._device.type == "cuda":
            group = self._groups[channel]
            operations = [
                dist.P2POp(dist.isend if post.sending else dist.irecv, post.part, post.peer, group)
                for post in posts
            ]
            works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
            return works
        return [self._start_one(channel, post) for post in posts]

    def _start_one(self, channel: Channel, post: _Post) -> dist.Work:
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
