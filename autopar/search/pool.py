"""The same work on several items at once, in forks of this process.

What a fork adds to caches is lost, so only work that takes long enough is worth one. Results are in
the order of the items, so that a search does not depend on how many processors there are.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from autopar.errors import InternalError
from autopar.forks import Fork, num_processors, outcome, start, unpickled

Item = TypeVar("Item")
Result = TypeVar("Result")
_WIDTH = 4  # bytes of a number; a pipe holds 16,384 of them


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None = None,
    sizes: Sequence[float] | None = None,
) -> list[Result]:
    """[work(item) for item in items], several at a time; results and errors must pickle. An error
    is raised as it would be without forks: that of the first item that has one; Ctrl-C ends all of
    them. sizes: what items may take, in any unit: the largest are begun first."""
    limit = min(num_processors() if workers is None else workers, len(items))
    if limit <= 1:
        return [work(item) for item in items]
    sizes = [1.0] * len(items) if sizes is None else sizes
    order = sorted(range(len(items)), key=lambda i: (-sizes[i], i))
    turns = _Turns(order)

    def one_after_the_other() -> dict[int, tuple[bool, Result | Exception]]:
        return {i: outcome(partial(work, items[i])) for i in turns}

    def in_fork() -> dict[int, tuple[bool, Result | Exception]]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports
        return one_after_the_other()

    forks = [start(in_fork) for _ in range(limit - 1)]
    try:
        answers = one_after_the_other()
        for fork in forks:
            answers.update(_received(fork))
    finally:
        turns.close()
        for fork in forks:
            fork.end(kill=True)
    results = []
    for i in range(len(items)):
        failed, result = answers[i]
        if failed:
            assert isinstance(result, Exception)
            raise result
        results.append(result)
    return results  # type: ignore[return-value]


class _Turns:
    """Numbers that this process and its forks take, each of them once."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._reader, writer = os.pipe()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(b"".join(number.to_bytes(_WIDTH, "little") for number in numbers))

    def __iter__(self) -> Iterator[int]:
        while taken := os.read(self._reader, _WIDTH):
            yield int.from_bytes(taken, "little")

    def close(self) -> None:
        os.close(self._reader)


def _received(fork: Fork) -> dict[int, tuple[bool, Result | Exception]]:
    data, _ = fork.received()
    if not data:
        raise InternalError("a worker of the search ended without an answer")
    failed, answers = unpickled(data)
    if failed:
        raise answers
    found: dict[int, tuple[bool, Result | Exception]] = answers
    return found
