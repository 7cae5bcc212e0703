"""Work in a fork of this process: it has all that is built here, and its result comes through a
pipe. What it adds to caches is lost."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Generic, NoReturn, TypeVar

import torch

Key = TypeVar("Key")
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
            answer = _pickled(outcome(work))
        except Exception as error:  # it gives what does not pickle
            answer = pickle.dumps((True, error))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


class _Pickler(pickle.Pickler):
    """Operators of torch go by their names: "aten.mm.default"."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return _operator, (str(value),)
        return NotImplemented


def _operator(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def unpickled(data: bytes) -> Any:
    """The `outcome` that a fork sent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of pytree's leaves, which it makes so
        return pickle.loads(data)


def outcome(work: Callable[[], T]) -> tuple[bool, T | Exception]:
    """(False, what work gives) or (True, its error)."""
    try:
        return False, work()
    except Exception as error:
        return True, error


def num_processors() -> int:
    """Processors that this process may use; 1 where forking is not possible or not safe."""
    if not hasattr(os, "fork") or sys.platform == "darwin" or torch.cuda.is_initialized():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


class Ahead(Generic[Key, T]):
    """work(key) of keys that will be asked for, done in forks on the other processors."""

    def __init__(self, work: Callable[[Key], T]) -> None:
        self._work = work
        self._begun: dict[Key, Fork] = {}
        self._number = 0
        self._turns: IO[bytes] | None = None

    def expect(self, *keys: Key) -> None:
        """In this order. Nothing where there is no other processor."""
        others = num_processors() - 1
        if others and self._turns is None:
            self._turns = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        for key in keys if others else ():
            if key not in self._begun:
                self._begun[key] = start(partial(self._in_turn, key, self._number % others))
                self._number += 1

    def taken(self, key: Key) -> T | None:
        """The result, once. None for the caller to do the work: it was not expected, or failed."""
        fork = self._begun.pop(key, None)
        if fork is None:
            return None
        try:
            data, _ = fork.received()
        finally:
            fork.end(kill=True)
        failed, result = unpickled(data) if data else (True, None)
        return None if failed else result

    def close(self) -> None:
        """Ends the work that nobody has asked for."""
        while self._begun:
            self._begun.popitem()[1].end(kill=True)
        if self._turns is not None:
            self._turns.close()
            self._turns = None

    def _in_turn(self, key: Key, processor: int) -> T:
        """In a fork: after those before it on its processor. A lock, which ends with its owner."""
        import fcntl  # where there are forks

        assert self._turns is not None
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports
        fcntl.lockf(self._turns, fcntl.LOCK_EX, 1, processor)
        try:
            return self._work(key)
        finally:
            fcntl.lockf(self._turns, fcntl.LOCK_UN, 1, processor)
