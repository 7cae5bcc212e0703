"""Process groups: who makes them, and how a rank that fails takes the others with it.

A World is the job: its ranks, store and default group. A RankComm is what one rank of one plan
needs: a group per axis of its stages' meshes, a group per ordered pair of workers (so that the NCCL
streams of the two directions cannot block each other), and the stages' DeviceMeshes. All ranks make
all groups in one order. Backends: NCCL for CUDA, gloo for the CPU.

Failure: `World.guard` publishes a rank's error in the store and aborts its groups, so that the
other ranks fail at once, with that error as their reason, instead of waiting for their timeout.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import pickle
import time
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import AutoparError, InternalError, PlanError, RuntimeFailure
from autopar.lowering.lower import LoweredPlan, LoweredStage
from autopar.mesh import AXIS_NAMES
from autopar.runtime.collectives import ProcessCollectives
from autopar.runtime.host import HOST
from autopar.runtime.routes import channels
from autopar.runtime.transport import ProcessTransport, connect_ends

_LOG = logging.getLogger(__name__)
_WORLDS = itertools.count(1)  # of this process: all use one store
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.005, 0.25  # between two looks into the store
_FAILURE = "autopar/failure"
_LOCALHOST = "127.0.0.1"
_BOTH = "cpu:gloo,cuda:nccl"  # of stages that use hosts: for tensors of either
DEFAULT_TIMEOUT = timedelta(minutes=10)


class PeerFailure(RuntimeFailure):
    """This rank stopped because another one failed; the text has the other one's error."""


class GroupUser(Protocol):
    """What goes on using process groups after a call has returned."""

    def release(self) -> None: ...


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
        self._number = next(_WORLDS)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._users: weakref.WeakValueDictionary[int, GroupUser] = weakref.WeakValueDictionary()
        self._user_numbers = itertools.count()

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
        """A name that is new, and the same on all ranks that connect and ask in the same order."""
        self._counts[prefix] += 1
        return f"{prefix}{self._number}.{self._counts[prefix]}"

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object that the source rank passes, on every rank. Any object that can be pickled."""
        key = self.next_name("autopar/object/")
        if self.rank == source:
            # the stub says str; the binding takes bytes as well
            self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]
            return value
        self._wait([key], f"rank {source} to send an object")
        return pickle.loads(self._store.get(key))

    def agree(self, what: str, find: Callable[[], int]) -> int:
        """The number that the first rank to ask found, on every rank that asks for `what`. Who
        asks later does not look for it, and nobody waits."""
        key = f"autopar/agreed{self._number}/{what}"
        if not self._store.check([key]):
            self._store.compare_set(key, "", str(find()))
        return int(self._store.get(key))

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

    def release_first(self, user: GroupUser) -> None:
        """Whoever uses the groups beyond a call is released before they end, the last to come
        first: copies that wait for other ranks before the graph that they are in."""
        self._users[next(self._user_numbers)] = user

    def abort(self) -> None:
        """Gives up all groups without waiting for peers, who then fail too."""
        with contextlib.suppress(Exception):  # a group that is half gone says so; nothing to do
            self._release()
            if self.device.type == "cuda":
                distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()

    def close(self) -> None:
        """Ends the job in an orderly way, if this object started it."""
        self._release()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _release(self) -> None:
        for user in reversed(list(self._users.values())):
            user.release()

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


_Place = tuple[tuple[int, ...], tuple[int, ...]]  # devices and axis sizes of a stage


@dataclass(frozen=True, slots=True, eq=False)
class RankComm:
    """What one rank uses of a plan's groups. rank: in the meshes of its stages. collectives,
    meshes: by stage, of those that the rank plays. host_meshes: also by stage, for DTensors in the
    memory of the devices' hosts; as in `meshes` where no parameter of the stage rests there."""

    rank: int
    groups: Mapping[int, tuple[tuple[str, int], ...]]  # name and size, by stage and axis
    collectives: Mapping[int, ProcessCollectives]
    meshes: Mapping[int, DeviceMesh]
    host_meshes: Mapping[int, DeviceMesh]
    transport: ProcessTransport


def connect_rank(world: World, lowered: LoweredPlan) -> RankComm:
    """Makes all groups of a plan, on all ranks in one order, and returns this rank's part. Stages
    with the same devices and mesh share the groups of its axes."""
    name = world.next_name("autopar/plan/")
    made: dict[_Place, list[dist.ProcessGroup]] = {}
    on_hosts = {_place(stage) for stage in lowered.stages if _uses_hosts(stage)}
    for stage in lowered.stages:
        if _place(stage) not in made:
            both = _place(stage) in on_hosts and world.device.type == "cuda"
            prefix, backend = f"{name}/stage{stage.index}", _BOTH if both else None
            groups = [
                _axis_group(world, stage, axis, f"{prefix}/{AXIS_NAMES[axis]}", backend)
                for axis in range(stage.mesh.num_axes)
            ]
            made[_place(stage)] = [group for group in groups if group is not None]
    pairs = {}
    for number, (channel, ends) in enumerate(channels(lowered).items()):
        ranks = sorted({*channel[0], *channel[1]})
        group = _new_group(world, ranks, f"{name}/channel{number}")
        if group is not None:
            pairs[channel] = group
            if world.device.type == "cuda":
                connect_ends(world.rank, world.device, group, ends)
    own = [stage for stage in lowered.stages if world.rank in stage.devices]
    axis_groups = {s.index: made[_place(s)] for s in own}
    meshes = {s.index: _device_mesh(s, axis_groups[s.index], world.device.type) for s in own}
    separate = [s for s in own if _uses_hosts(s) and world.device.type != HOST.type]
    host_meshes = {s.index: _device_mesh(s, axis_groups[s.index], HOST.type) for s in separate}
    axes: dict[int, tuple[tuple[str, int], ...]] = {
        s.index: tuple(
            (group.group_name, size)
            for group, size in zip(axis_groups[s.index], s.mesh.axis_sizes, strict=True)
        )
        for s in own
    }
    return RankComm(
        rank=own[0].devices.index(world.rank),
        groups=axes,
        collectives={index: ProcessCollectives(found) for index, found in axes.items()},
        meshes=meshes,
        host_meshes=meshes | host_meshes,
        transport=ProcessTransport(lowered, world.rank, pairs, world.device),
    )


def _place(stage: LoweredStage) -> _Place:
    return stage.devices, stage.mesh.axis_sizes


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
    world: World, stage: LoweredStage, axis: int, name: str, backend: str | None
) -> dist.ProcessGroup | None:
    """The group of this rank over one axis of a stage; all ranks make all groups of the axis."""
    mine = None
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
