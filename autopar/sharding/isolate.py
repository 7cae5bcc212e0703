"""Work done in a forked process, for operators that may crash or hang on inputs of our making."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from autopar.errors import AutoparError

T = TypeVar("T")
LIMIT_S = 30.0  # some ten times what a search takes
_CHUNK = 1 << 16


class Crashed(AutoparError):
    """The work did not return: the text says why."""


def isolated(work: Callable[[], T], limit_s: float) -> T:
    """work() in a fork of this process, on one thread; its result must pickle. Crashed where it
    dies, or takes longer than limit_s. Where there is no fork it is called here."""
    if not hasattr(os, "fork"):
        return work()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(work, writer)
    os.close(writer)
    try:
        data, in_time = _read_all(reader, time.monotonic() + limit_s)
    finally:
        os.close(reader)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not in_time:
        raise Crashed(f"it takes longer than {limit_s:.0f} s")
    if os.WIFSIGNALED(status):
        raise Crashed(f"it crashes with {signal.Signals(os.WTERMSIG(status)).name}")
    if not data:
        raise Crashed("it ends the process")
    failed, result = pickle.loads(data)
    if failed:
        raise result
    return result  # type: ignore[no-any-return]


def _answer(work: Callable[[], T], writer: int) -> NoReturn:
    """In the child. It ends without any of the parent's clean-up."""
    try:
        faulthandler.disable()  # the parent says what happened
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        try:
            answer = pickle.dumps((False, work()))
        except Exception as error:
            answer = pickle.dumps((True, error))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


def _read_all(reader: int, deadline: float) -> tuple[bytes, bool]:
    """Everything up to the end of the pipe, and whether that came before the deadline."""
    data = bytearray()
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return bytes(data), False
        chunk = os.read(reader, _CHUNK)
        if not chunk:
            return bytes(data), True
        data += chunk
