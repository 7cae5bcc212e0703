"""The same work on several items at once, in forks of this process.

What a fork adds to caches is lost, so only work that takes long enough is worth one. Results are in
the order of the items, so that a search does not depend on how many processors there are.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from autopar.errors import InternalError
from autopar.forks import Fork, num_processors, outcome, start, unpickled

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> list[Result]:
    """[work(item) for item in items], several at a time; results and errors must pickle. The first
    item is done here. An error is raised as it would be without forks: that of the first item that
    has one; Ctrl-C ends all of them."""
    limit = min(num_processors() if workers is None else workers, len(items))
    if limit <= 1:
        return [work(item) for item in items]
    shares = [range(w, len(items), limit) for w in range(limit)]
    forks = [_start(work, [items[i] for i in share]) for share in shares[1:]]
    answers: dict[int, tuple[bool, Result | Exception]] = {}
    try:
        for i in shares[0]:
            answers[i] = outcome(partial(work, items[i]))
        for share, fork in zip(shares[1:], forks, strict=True):
            answers.update(zip(share, _received(fork), strict=True))
    finally:
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


def _start(work: Callable[[Item], Result], items: Sequence[Item]) -> Fork:
    def all_of_them() -> list[tuple[bool, Result | Exception]]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports
        return [outcome(partial(work, item)) for item in items]

    return start(all_of_them)


def _received(fork: Fork) -> list[tuple[bool, Result | Exception]]:
    data, _ = fork.received()
    if not data:
        raise InternalError("a worker of the search ended without an answer")
    failed, answers = unpickled(data)
    if failed:
        raise answers
    found: list[tuple[bool, Result | Exception]] = answers
    return found
