"""Jobs that use the devices one at a time: in turn, after one that dies; what a waiting one says. A
job is a process with a group of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.turns import Turns

_CONTEXT = multiprocessing.get_context("fork")  # torch is there already
_LIMIT_S = 60


def job(play: Callable[[Turns, Connection], None], path: str) -> tuple[BaseProcess, Connection]:
    ours, theirs = _CONTEXT.Pipe()

    def run() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        play(Turns(path), theirs)

    process = _CONTEXT.Process(target=run, daemon=True)
    process.start()
    return process, ours


def said(connection: Connection) -> Any:
    assert connection.poll(_LIMIT_S), "nothing was said"
    return connection.recv()


def holds_until_it_dies(turns: Turns, connection: Connection) -> None:
    with turns.taken():
        connection.send("has it")
        connection.recv()
        os._exit(3)


def waits(turns: Turns, connection: Connection) -> None:
    connection.send("waits")
    with turns.taken(), turns.taken():
        connection.send("has it")


def takes_times(turns: Turns, connection: Connection) -> None:
    for _ in range(3):
        with turns.taken():
            started = time.monotonic()
            time.sleep(0.01)
            connection.send((started, time.monotonic()))


def test_a_job_waits_says_so_and_goes_on_when_the_holder_dies(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "lock")
    holder, to_holder = job(holds_until_it_dies, path)
    assert said(to_holder) == "has it"
    waiter, to_waiter = job(waits, path)
    assert said(to_waiter) == "waits"
    assert not to_waiter.poll(0.2)
    to_holder.send("die")
    assert said(to_waiter) == "has it"
    for process in (holder, waiter):
        process.join(_LIMIT_S)
    assert (holder.exitcode, waiter.exitcode) == (3, 0)
    assert f"another job has {path}" in capfd.readouterr().err


def test_no_two_jobs_have_the_devices_at_a_time(tmp_path: Path) -> None:
    jobs = [job(takes_times, str(tmp_path / "lock")) for _ in range(3)]
    times = [said(connection) for _, connection in jobs for _ in range(3)]
    pairs = itertools.pairwise(sorted(times))
    assert all(before[1] <= after[0] for before, after in pairs)


def test_without_a_lock_file_it_is_always_ones_turn() -> None:
    with Turns(None).taken():
        pass
