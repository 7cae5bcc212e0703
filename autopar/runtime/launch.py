"""Starts the processes of a job: joins those that torchrun started, or spawns local ones."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from autopar.errors import InternalError, OptionError, RuntimeFailure
from autopar.runtime.comm import (
    DEFAULT_TIMEOUT,
    PeerFailure,
    World,
    host_store,
    is_connected,
    join_store,
)

_GRACE_S = 3.0  # for the other ranks to end by themselves after one has failed


class _Ending(IntEnum):
    """How a process ended; what explains a failure best comes first."""

    DIED = 0  # without a word
    FAILED = 1
    STOPPED = 2  # because another one failed
    DONE = 3


@dataclass(frozen=True, slots=True)
class _Message:
    """value: the result, or the traceback. time: of the failure, seconds since the epoch."""

    ending: _Ending
    value: Any
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a spawned process finds the others."""

    device_type: str
    rank: int
    size: int
    port: int
    timeout: timedelta


def torchrun_world(timeout: timedelta = DEFAULT_TIMEOUT) -> World | None:
    """The job that torchrun started this process for, or the one it has joined; None without one.
    One CUDA device per process where there are any, else the CPU."""
    if not is_connected() and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = _local_rank()
        if local >= torch.cuda.device_count():
            raise OptionError(
                f"local rank {local} has no device: this node has {torch.cuda.device_count()}. "
                "Start as many processes per node as there are devices."
            )
        device = torch.device("cuda", local)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return World.connect(None, rank, size, device=device, timeout=timeout)


def _local_rank() -> int:
    """Index of this process's CUDA device. Who joined the job by other means than torchrun has said
    it with torch.cuda.set_device."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    return torch.cuda.current_device() if is_connected() else 0


def run_processes(
    fn: Callable[..., Any],
    num_processes: int,
    *args: Any,
    device_type: str = "cpu",
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> list[Any]:
    """fn(world, *args) in as many local processes; their results by rank. device_type: "cpu" (gloo)
    or "cuda" (NCCL, one device each).

    fn and args must be importable and picklable: processes are spawned, not forked. RuntimeFailure
    with the traceback of the rank that failed first; the others are then ended. timeout: of one
    wait between ranks, not of the whole run.
    """
    store = host_store(timeout)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(num_processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(
                    theirs,
                    fn,
                    args,
                    _Place(device_type, rank, num_processes, store.port, timeout),
                ),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(processes, pipes)
    finally:
        _end(processes)
        for pipe in pipes:
            pipe.close()


def _child(pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...], place: _Place) -> None:
    """Sends a _Message and ends."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.size))
    cuda = place.device_type == "cuda"
    device = torch.device("cuda", place.rank) if cuda else torch.device(place.device_type)
    world = None
    try:
        store = join_store(place.port, place.timeout)
        world = World.connect(store, place.rank, place.size, device=device, timeout=place.timeout)
        payload = pickle.dumps(_Message(_Ending.DONE, fn(world, *args)))
    except BaseException as error:
        ending = _Ending.STOPPED if isinstance(error, PeerFailure) else _Ending.FAILED
        pipe.send_bytes(pickle.dumps(_Message(ending, traceback.format_exc(), time.time())))
        if world is not None:
            world.abort()
        os._exit(1)  # peers must see the end at once: no destructor may wait for them
    pipe.send_bytes(payload)
    world.close()


def _collect(processes: Sequence[BaseProcess], pipes: Sequence[Connection]) -> list[Any]:
    """Results by rank, or the first failure."""
    messages: dict[int, _Message] = {}
    waiting = {id(pipe): rank for rank, pipe in enumerate(pipes)}
    deadline: float | None = None
    while waiting and (deadline is None or time.monotonic() < deadline):
        pending = [pipes[rank] for rank in waiting.values()]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for pipe in wait(pending, left):
            rank = waiting.pop(id(pipe))
            messages[rank] = message = _receive(processes[rank], pipes[rank])
            if message.ending is not _Ending.DONE and deadline is None:
                deadline = time.monotonic() + _GRACE_S
    failed = {r: m for r, m in messages.items() if m.ending is not _Ending.DONE}
    if failed:
        first = min(failed, key=lambda r: (failed[r].ending, failed[r].time))
        raise RuntimeFailure(
            f"rank {first} of {len(processes)} failed; the others were ended. Its error:\n"
            f"{failed[first].value}"
        )
    return [messages[rank].value for rank in range(len(processes))]


def _receive(process: BaseProcess, pipe: Connection) -> _Message:
    try:
        message = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(_GRACE_S)
        text = f"the process ended without a word, with exit code {process.exitcode}"
        return _Message(_Ending.DIED, text, time.time())
    if not isinstance(message, _Message):
        raise InternalError(f"a process sent {message!r}")
    return message


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ends those that are still there, politely first."""
    for process in processes:
        process.join(_GRACE_S if process.exitcode is None and not _any_failed(processes) else 0)
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()


def _any_failed(processes: Sequence[BaseProcess]) -> bool:
    return any(process.exitcode not in (None, 0) for process in processes)
