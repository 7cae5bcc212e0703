"""Cases side by side: results by number, limits, cases that fail."""

from __future__ import annotations

import os
import time

from benchmarks import jobs


def work(item: int) -> tuple[int, int]:
    if item == 1:
        raise ValueError("one")
    if item == 2:
        os._exit(3)
    if item == 3:
        time.sleep(60)
    return item, len(os.sched_getaffinity(0))


def test_results_and_why_there_is_none() -> None:
    found = dict(jobs.each(work, range(6), jobs=2, limit_s=1.0))
    assert found[1] == "ValueError: one"
    assert found[2] == "the process ended without a result"
    assert found[3] == "no result within 1 s"
    share = max(1, -(-len(os.sched_getaffinity(0)) // 2))
    for number in (0, 4, 5):
        item, processors = found[number]
        assert item == number and isinstance(processors, int) and processors <= share


def test_nothing_starts_too_late() -> None:
    assert list(jobs.each(work, [0], ends_after_s=0.0)) == []
