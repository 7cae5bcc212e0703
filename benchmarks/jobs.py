"""Comparisons of many cases: arguments, cases side by side, and the files that they end in.

Independent cases of a benchmark, several at a time in forks of this process, each with its own
processors, so that the search inside a case does not fork onto those of another.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from autopar.forks import Fork, start, unpickled
from benchmarks import environment
from benchmarks.run import RESULTS

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Running:
    number: int
    fork: Fork
    started: float  # of time.monotonic(), as is until
    until: float
    processors: frozenset[int]


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    jobs: int = 1,
    limit_s: float = 3600.0,
    ends_after_s: float = float("inf"),
) -> Iterator[tuple[int, Result | str]]:
    """(number of the item, work(item)) as they end, or a text that says why there is no result.

    limit_s: of one item, which is killed then. ends_after_s: no item starts later, and those that
    run then are killed. What `work` needs should be imported before, as every fork would import it
    again.
    """
    allowed = sorted(os.sched_getaffinity(0))
    free = [frozenset(allowed[k::jobs] or allowed) for k in range(jobs)]
    waiting = list(range(len(items)))
    running: dict[int, _Running] = {}
    end = time.monotonic() + ends_after_s
    try:
        while running or (waiting and time.monotonic() < end):
            while free and waiting and time.monotonic() < end:
                number, processors = waiting.pop(0), free.pop(0)
                fork = start(partial(_on, processors, partial(work, items[number])))
                started = time.monotonic()
                until = min(started + limit_s, end)
                running[fork.reader] = _Running(number, fork, started, until, processors)
            first = min(job.until for job in running.values())
            left = max(0.0, first - time.monotonic())
            ready, _, _ = select.select(list(running), [], [], left)
            late = [r for r, job in running.items() if job.until <= time.monotonic()]
            for reader in ready or late:
                job = running.pop(reader)
                free.append(job.processors)
                yield job.number, _answer(job, ended=reader in ready)
    finally:
        for job in running.values():
            job.fork.end(kill=True)


def _on(processors: frozenset[int], work: Callable[[], Result]) -> Result:
    os.sched_setaffinity(0, processors)
    return work()


def _answer(job: _Running, *, ended: bool) -> Any:
    data = job.fork.received()[0] if ended else b""
    job.fork.end(kill=not ended)
    if not ended:
        return f"no result within {job.until - job.started:.0f} s"
    if not data:
        return "the process ended without a result"
    failed, result = unpickled(data)
    return f"{type(result).__name__}: {result}" if failed else result


# ---- a benchmark made of them


def add_arguments(parser: argparse.ArgumentParser, *, minutes: float, limit_s: float) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="cases side by side")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="then it ends with what it has"
    )
    parser.add_argument("--limit", type=float, default=limit_s, help="seconds of one case at most")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")


def import_all() -> None:
    """What capture and search import when they are first used, once for all forks. Nothing is run:
    autograd has threads in builds for CUDA, and does not work in a fork of a process that used
    it."""
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.decomposition"):
        importlib.import_module(name)


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """results: in the order of the cases. failures: texts of the others that were started."""

    results: list[Result]
    failures: list[str]


def compared(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    args: argparse.Namespace,
    line: Callable[[Result], str],
) -> Done[Result]:
    """Each case, and a line about it as soon as it is there. args: of `add_arguments`."""
    found: dict[int, Result | str] = {}
    minutes_s = 60 * args.minutes
    for number, result in each(
        work, items, jobs=args.jobs, limit_s=args.limit, ends_after_s=minutes_s
    ):
        found[number] = result
        print(f"{items[number]}: {result}" if isinstance(result, str) else line(result), flush=True)
    in_order = sorted(found.items())
    return Done(
        [result for _, result in in_order if not isinstance(result, str)],
        [f"{items[n]}: {result}" for n, result in in_order if isinstance(result, str)],
    )


def command(name: str) -> str:
    return " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])


def where() -> dict[str, object]:
    """The facts of a result's head."""
    return {
        "commit": environment.commit(),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.versions().items()),
        "hardware": json.dumps(environment.hardware()),
    }


def write(name: str, text: str, facts: Mapping[str, object], results: Sequence[Any]) -> None:
    """benchmarks/results/name.md and .json."""
    records = [asdict(r) | {"ratio": r.ratio} for r in results]
    data = json.dumps({**facts, "results": records}, indent=1)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(data + "\n", encoding="utf-8")
