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
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

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
        self._waiting: list[Key] = []
        self._running: dict[Key, Fork] = {}

    def expect(self, key: Key) -> None:
        if key not in self._waiting and key not in self._running:
            self._waiting.append(key)
            self._go_on()

    def taken(self, key: Key) -> T | None:
        """The result, once. None for the caller to do the work: it was not begun, or failed."""
        if key in self._waiting:
            self._waiting.remove(key)
        fork = self._running.get(key)
        if fork is None:
            return None
        data, _ = fork.received()
        self._running.pop(key).end(kill=True)
        self._go_on()
        failed, result = unpickled(data) if data else (True, None)
        return None if failed else result

    def close(self) -> None:
        """Ends the work that nobody has asked for."""
        self._waiting.clear()
        while self._running:
            self._running.popitem()[1].end(kill=True)

    def _go_on(self) -> None:
        while self._waiting and len(self._running) < num_processors() - 1:
            key = self._waiting.pop(0)
            self._running[key] = start(partial(self._silently, key))

    def _silently(self, key: Key) -> T:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports
        return self._work(key)
