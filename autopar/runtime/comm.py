"""Process groups and everything that goes through them: the only file that calls torch.distributed.

A World is the job: its ranks, store and default group. A StageComm is what one rank of one plan
needs: a group per axis of its stage's mesh, a group per ordered pair of stages (so that the NCCL
streams of the two directions cannot block each other), and the stage's DeviceMesh. All ranks make
all groups in one order. Backends: NCCL for CUDA, gloo for the CPU.

Failure: `World.guard` publishes a rank's error in the store and aborts its groups, so that the
other ranks fail at once, with that error as their reason, instead of waiting for their timeout.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import pickle
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import AutoparError, InternalError, PlanError, RuntimeFailure
from autopar.lowering.lower import LoweredPlan, LoweredStage
from autopar.lowering.program import CollectiveOp
from autopar.lowering.transfer import Tile, Transfer
from autopar.mesh import AXIS_NAMES
from autopar.runtime.host import HOST
from autopar.runtime.interpreter import Shards
from autopar.runtime.routes import Route, channels, cut_tile, join_tiles, tile_shape

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.005, 0.25  # between two looks into the store
_FAILURE = "autopar/failure"
_LOCALHOST = "127.0.0.1"
_BOTH = "cpu:gloo,cuda:nccl"
DEFAULT_TIMEOUT = timedelta(minutes=10)


class PeerFailure(RuntimeFailure):
    """This rank stopped because another one failed; the text has the other one's error."""


class World:
    """The processes of a job. Made by `connect`."""

    def __init__(self, device: torch.device, timeout: timedelta, *, owns_group: bool) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_size = min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size))))
        self.device = device
        self.timeout = timeout
        self._owns_group = owns_group
        self._store = distributed_c10d._get_default_store()
        self._counts: defaultdict[str, int] = defaultdict(int)

    @classmethod
    def connect(
        cls,
        store: distributed_c10d.Store | None,
        rank: int,
        size: int,
        *,
        device: torch.device,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> Self:
        """Joins the job; where a default process group exists already, that one is used."""
        if dist.is_initialized():
            return cls(device, timeout, owns_group=False)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        return cls(device, timeout, owns_group=True)

    def check_size(self, num_devices: int) -> None:
        """PlanError unless the plan is for as many devices as there are processes."""
        if num_devices != self.size:
            raise PlanError(
                f"the plan is for {num_devices} devices and this job has {self.size} processes: "
                f"start it with --nproc-per-node so that there are {num_devices}, or plan for "
                f"{self.size} devices"
            )

    def next_name(self, prefix: str) -> str:
        """A name that is new, and the same on all ranks that ask in the same order."""
        self._counts[prefix] += 1
        return f"{prefix}{self._counts[prefix]}"

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object that the source rank passes, on every rank. Any object that can be pickled."""
        key = self.next_name("autopar/object/")
        if self.rank == source:
            # the stub says str; the binding takes bytes as well
            self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]
            return value
        self._wait([key], f"rank {source} to send an object")
        return pickle.loads(self._store.get(key))

    def barrier(self) -> None:
        """Waits for all ranks; RuntimeFailure names those that did not come in time."""
        name = self.next_name("autopar/barrier/")
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], "1")
        self._wait(keys, "the other ranks at a barrier")

    def all_reduce(self, value: Tensor, reduce: str = "sum") -> Tensor:
        """In place, over all ranks of the job."""
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        dist.all_reduce(value, kinds[reduce])
        return value

    def broadcast(self, value: Tensor, source: int) -> Tensor:
        """In place, from one rank of the job."""
        dist.broadcast(value, source)
        return value

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Whatever fails inside takes the job down: RuntimeFailure with the first failing rank's
        error on every rank. The groups are unusable afterwards."""
        try:
            yield
        except Exception as error:
            first = self._publish(f"rank {self.rank} failed in {what}:\n{_text_of(error)}")
            self.abort()
            if first is None and isinstance(error, AutoparError):
                raise
            if first is None:
                text = f"rank {self.rank} failed in {what}: {type(error).__name__}: {error}"
                raise RuntimeFailure(text) from error
            raise PeerFailure(f"rank {self.rank} stopped in {what} because {first}") from error

    def abort(self) -> None:
        """Gives up all groups without waiting for peers, who then fail too."""
        with contextlib.suppress(Exception):  # a group that is half gone says so; nothing to do
            if self.device.type == "cuda":
                distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()

    def close(self) -> None:
        """Ends the job in an orderly way, if this object started it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _publish(self, text: str) -> str | None:
        """Sets the job's failure, unless another rank has failed before: then its text."""
        try:
            found = self._store.compare_set(_FAILURE, "", text).decode()
        except Exception:  # the store is gone with the rank that hosts it
            _LOG.exception("rank %d could not publish its failure", self.rank)
            return None
        return None if found == text else found

    def _wait(self, keys: Sequence[str], what: str) -> None:
        """Polls, where a blocking wait would make torch log a time-out each second."""
        deadline = time.monotonic() + self.timeout.total_seconds()
        pause = _FIRST_PAUSE_S
        while not self._store.check(list(keys)):
            if self._store.check([_FAILURE]):
                raise PeerFailure(self._store.get(_FAILURE).decode())
            if time.monotonic() > deadline:
                missing = [key for key in keys if not self._store.check([key])]
                raise RuntimeFailure(
                    f"rank {self.rank} waited {self.timeout} for {what}; missing: {missing}"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_S)


def is_connected() -> bool:
    """Whether this process has a default process group."""
    return dist.is_initialized()


def host_store(timeout: timedelta) -> TCPStore:
    """A store on a free local port, hosted by this process, which need not be a rank."""
    return TCPStore(_LOCALHOST, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def join_store(port: int, timeout: timedelta) -> TCPStore:
    return TCPStore(_LOCALHOST, port, is_master=False, timeout=timeout)


def _text_of(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).strip()


@dataclass(frozen=True, slots=True, eq=False)
class StageComm:
    """What one rank uses of a plan's groups. rank: in the stage's mesh. host_mesh: the mesh for
    DTensors in the memory of the devices' hosts; `mesh` where no parameter of the stage rests
    there."""

    stage: int
    rank: int
    collectives: ProcessCollectives
    transport: ProcessTransport
    mesh: DeviceMesh
    host_mesh: DeviceMesh


def connect_stage(world: World, lowered: LoweredPlan) -> StageComm:
    """Makes all groups of a plan, on all ranks in one order, and returns this rank's part."""
    name = world.next_name("autopar/plan/")
    axis_groups: dict[int, list[dist.ProcessGroup]] = {}
    for stage in lowered.stages:
        for axis in range(stage.mesh.num_axes):
            group = _axis_group(world, stage, axis, f"{name}/stage{stage.index}/{AXIS_NAMES[axis]}")
            if group is not None:
                axis_groups.setdefault(stage.index, []).append(group)
    pairs = {}
    for source, target in channels(lowered):
        ranks = sorted((*lowered.stages[source].devices, *lowered.stages[target].devices))
        group = _new_group(world, ranks, f"{name}/stage{source}to{target}")
        if group is not None:
            pairs[source, target] = group
    index = next(s.index for s in lowered.stages if world.rank in s.devices)
    stage = lowered.stages[index]
    rank = stage.devices.index(world.rank)
    mesh = _device_mesh(stage, axis_groups[index], world.device.type)
    host = HOST.type
    separate = _uses_hosts(stage) and host != world.device.type
    return StageComm(
        stage=index,
        rank=rank,
        collectives=ProcessCollectives(
            [group.group_name for group in axis_groups[index]], stage.mesh.axis_sizes
        ),
        transport=ProcessTransport(lowered.stages, index, rank, pairs, world.device),
        mesh=mesh,
        host_mesh=_device_mesh(stage, axis_groups[index], host) if separate else mesh,
    )


def _device_mesh(
    stage: LoweredStage, groups: list[dist.ProcessGroup], device_type: str
) -> DeviceMesh:
    return DeviceMesh.from_group(
        groups,
        device_type,
        mesh=torch.tensor(stage.devices).reshape(stage.mesh.axis_sizes),
        mesh_dim_names=AXIS_NAMES[: stage.mesh.num_axes],
    )


def _uses_hosts(stage: LoweredStage) -> bool:
    return any(p.host for p in stage.parameters)


def _axis_group(
    world: World, stage: LoweredStage, axis: int, name: str
) -> dist.ProcessGroup | None:
    """The group of this rank over one axis of a stage; all ranks make all groups of the axis. One
    of a stage that uses hosts takes tensors of both."""
    mine = None
    backend = _BOTH if _uses_hosts(stage) and world.device.type == "cuda" else None
    for members in stage.mesh.groups(axis):
        ranks = [stage.devices[m] for m in members]
        group = _new_group(world, ranks, f"{name}/{members[0]}", backend)
        mine = group or mine
    return mine


def _keep_order(ranks: Sequence[int]) -> dict[str, Any]:
    """Arguments by which a group keeps its ranks in the given order; before torch 2.12 it sorts."""
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        return {"sort_ranks": False}
    if list(ranks) != sorted(ranks):
        raise PlanError(
            f"torch {torch.__version__} cannot make a group of the ranks {list(ranks)} in this "
            "order: number the devices of each stage in increasing order, or use torch 2.13"
        )
    return {}


def _new_group(
    world: World, ranks: Sequence[int], name: str, backend: str | None = None
) -> dist.ProcessGroup | None:
    """None on ranks outside of it. backend: by default that of the job. A CUDA group is used once
    at birth, so that no later point-to-point call has to make its communicator."""
    group = dist.new_group(
        list(ranks),
        timeout=world.timeout,
        backend=backend,
        group_desc=name,
        **_keep_order(ranks),
    )
    if world.rank not in ranks:
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise InternalError(f"rank {world.rank} should be in group {name}")
    if world.device.type == "cuda":
        dist.all_reduce(torch.zeros(1, device=world.device), group=group)
    return group


class ProcessCollectives:
    """Collectives of one rank, as functional collectives on the groups of its mesh axes."""

    def __init__(self, group_names: Sequence[str], axis_sizes: Sequence[int]) -> None:
        self._groups = tuple(zip(group_names, axis_sizes, strict=True))

    def run(self, op: str, shards: Shards, axis: int, reduce: str) -> Shards:
        functional = torch.ops._c10d_functional
        name, size = self._groups[axis]
        (shard,) = shards
        shard = shard.contiguous()
        if op == CollectiveOp.ALL_REDUCE:
            result = functional.all_reduce(shard, reduce, name)
        elif op == CollectiveOp.ALL_GATHER:
            result = functional.all_gather_into_tensor(shard, size, name)
        elif op == CollectiveOp.REDUCE_SCATTER:
            result = functional.reduce_scatter_tensor(shard, reduce, size, name)
        elif op == CollectiveOp.ALL_TO_ALL:
            rows = [shard.shape[0] // size] * size
            result = functional.all_to_all_single(shard, rows, rows, name)
        else:
            raise InternalError(f"no collective {op!r}")
        return [functional.wait_tensor(result)]

    def exchange(self, rows: Shards, sends: Shards, receives: Shards, axis: int) -> Shards:
        functional = torch.ops._c10d_functional
        outgoing, incoming = sends[0].tolist(), receives[0].tolist()
        shard = rows[0][: sum(outgoing)].contiguous()
        name, _ = self._groups[axis]
        result = functional.all_to_all_single(shard, incoming, outgoing, name)
        return [functional.wait_tensor(result)]


class ProcessTransport:
    """Tiles between the ranks of two stages, in the fixed order of the routes.

    Sends return at once; their buffers live until they are done. CUDA tiles of one call and one
    pair of stages travel as one NCCL group call.
    """

    def __init__(
        self,
        stages: Sequence[LoweredStage],
        stage: int,
        rank: int,
        groups: Mapping[tuple[int, int], dist.ProcessGroup],
        device: torch.device,
    ) -> None:
        self._stages = stages
        self._stage = stage
        self._rank = rank
        self._groups = groups
        self._device = device
        self._pending: list[tuple[list[dist.Work], list[Tensor]]] = []
        self._tags: defaultdict[tuple[int, int], int] = defaultdict(int)

    def send(self, transfers: Route, values: Sequence[Shards]) -> None:
        self._reap()
        mesh = self._stages[self._stage].mesh
        queues: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for transfer, (shard,) in zip(transfers, values, strict=True):
            target = self._stages[transfer.target_stage]
            for tile in transfer.tiles:
                if tile.source == self._rank:
                    part = cut_tile(shard, transfer, mesh, tile).contiguous()
                    queues[target.index].append((target.devices[tile.target], part))
        for target_stage, queue in queues.items():
            works = self._start((self._stage, target_stage), queue, sending=True)
            self._pending.append((works, [part for _, part in queue]))

    def receive(self, transfers: Route) -> list[Shards]:
        buffers: list[list[tuple[Tile, Tensor]]] = []
        queues: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for transfer in transfers:
            source = self._stages[transfer.source_stage]
            mine = [
                (t, self._buffer(transfer, t)) for t in transfer.tiles if t.target == self._rank
            ]
            buffers.append(mine)
            queues[source.index] += [(source.devices[t.source], b) for t, b in mine]
        works = []
        for source_stage, queue in queues.items():
            works += self._start((source_stage, self._stage), queue, sending=False)
        for work in works:
            work.wait()
        mesh = self._stages[self._stage].mesh
        return [
            [join_tiles(transfer, mesh, mine, self._device)]
            for transfer, mine in zip(transfers, buffers, strict=True)
        ]

    def flush(self) -> None:
        """Waits until every value that was sent has left."""
        for works, _ in self._pending:
            for work in works:
                work.wait()
        self._pending.clear()

    def _buffer(self, transfer: Transfer, tile: Tile) -> Tensor:
        return torch.empty(tile_shape(tile), dtype=transfer.meta.dtype, device=self._device)

    def _start(
        self, channel: tuple[int, int], queue: Sequence[tuple[int, Tensor]], *, sending: bool
    ) -> list[dist.Work]:
        group = self._groups[channel]
        call = dist.isend if sending else dist.irecv
        if self._device.type == "cuda":
            operations = [dist.P2POp(call, part, peer, group) for peer, part in queue]
            works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
            return works
        return [self._start_one(group, peer, part, sending=sending) for peer, part in queue]

    def _start_one(
        self, group: dist.ProcessGroup, peer: int, part: Tensor, *, sending: bool
    ) -> dist.Work:
        """Both ends number the tiles between two ranks, per direction."""
        me = self._stages[self._stage].devices[self._rank]
        ends = (me, peer) if sending else (peer, me)
        self._tags[ends] += 1
        tag = self._tags[ends] % (1 << 20)
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
