"""The same work on several items at once, in forks of this process.

A fork has all that the search has built, and gives its result back through a pipe. What it adds to
caches is lost, so only work that takes long enough is worth one. Results are in the order of the
items, so that a search does not depend on how many processors there are.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch

from autopar.errors import InternalError

Item = TypeVar("Item")
Result = TypeVar("Result")
_CHUNK = 1 << 20


def num_workers() -> int:
    """Processors that this process may use; 1 where forking is not possible or not safe."""
    if not hasattr(os, "fork") or sys.platform == "darwin" or torch.cuda.is_initialized():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def each(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> list[Result]:
    """[work(item) for item in items], several at a time; results and errors must pickle. The first
    item is done here. An error is raised as it would be without forks: that of the first item that
    has one; Ctrl-C ends all of them."""
    limit = min(num_workers() if workers is None else workers, len(items))
    if limit <= 1:
        return [work(item) for item in items]
    shares = [range(w, len(items), limit) for w in range(limit)]
    children = [_start(work, [items[i] for i in share]) for share in shares[1:]]
    answers: dict[int, tuple[bool, object]] = {}
    try:
        for i in shares[0]:
            answers[i] = _answer(work, items[i])
        for share, (_, reader) in zip(shares[1:], children, strict=True):
            answers.update(zip(share, _received(reader), strict=True))
    finally:
        for child, reader in children:
            with contextlib.suppress(OSError):
                os.close(reader)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    results = []
    for i in range(len(items)):
        failed, result = answers[i]
        if failed:
            assert isinstance(result, BaseException)
            raise result
        results.append(result)
    return results  # type: ignore[return-value]


def _answer(work: Callable[[Item], Result], item: Item) -> tuple[bool, object]:
    try:
        return False, work(item)
    except Exception as error:
        return True, error


def _start(work: Callable[[Item], Result], items: Sequence[Item]) -> tuple[int, int]:
    """(process, end of its pipe)."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _work(work, items, writer)
    os.close(writer)
    return child, reader


def _work(work: Callable[[Item], Result], items: Sequence[Item], writer: int) -> NoReturn:
    """In the child. It ends without any of the parent's clean-up."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        data = pickle.dumps([_answer(work, item) for item in items])
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)


def _received(reader: int) -> list[tuple[bool, object]]:
    data = bytearray()
    while True:
        select.select([reader], [], [])
        chunk = os.read(reader, _CHUNK)
        if not chunk:
            break
        data += chunk
    if not data:
        raise InternalError("a worker of the search ended without an answer")
    found: list[tuple[bool, object]] = pickle.loads(data)
    return found
