"""Work in a fork of this process: it has all that is built here, and its result comes through a
pipe. What it adds to caches is lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch

T = TypeVar("T")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Fork:
    """A process at work, and this process's end of its pipe."""

    child: int
    reader: int

    def received(self, limit_s: float | None = None) -> tuple[bytes, bool]:
        """The pickled result, b"" where the process died before; and whether it came in time."""
        data = bytearray()
        ends = None if limit_s is None else time.monotonic() + limit_s
        while True:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            ready, _, _ = select.select([self.reader], [], [], left)
            if not ready:
                return bytes(data), False
            chunk = os.read(self.reader, _CHUNK)
            if not chunk:
                return bytes(data), True
            data += chunk

    def end(self, *, kill: bool) -> int:
        """Closes the pipe and waits for the process; its wait status."""
        with contextlib.suppress(OSError):
            os.close(self.reader)
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)
        return os.waitpid(self.child, 0)[1]


def start(work: Callable[[], object]) -> Fork:
    """work() in a fork, on one thread. What comes back is its `outcome`, pickled."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(work, writer)
    os.close(writer)
    return Fork(child, reader)


def _answer(work: Callable[[], object], writer: int) -> NoReturn:
    """In the child. It ends without any of the parent's clean-up."""
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        try:
            answer = pickle.dumps(outcome(work))
        except Exception as error:  # it gives what does not pickle
            answer = pickle.dumps((True, error))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


def outcome(work: Callable[[], T]) -> tuple[bool, T | Exception]:
    """(False, what work gives) or (True, its error)."""
    try:
        return False, work()
    except Exception as error:
        return True, error
