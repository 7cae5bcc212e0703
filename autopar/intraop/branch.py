"""Branch and bound for a budgeted program whose Lagrangian bound stays far below its assignments.

In a small stage few tensors hold most of the bytes. The bound is then a mixture of an assignment A
that takes too many bytes and one B that fits, and no whole assignment is near it. So the program is
split at the node v whose bytes differ most between the two:

    x_v among the strategies with  m_v <= (m_v(A) + m_v(B)) / 2,   or among the others

and each part is solved as the whole was (`memory`), the part of least bound first, until no part
has a bound below the best assignment. The least bound of what is left is one of the program.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from autopar.errors import NoFeasiblePlan
from autopar.intraop.free import Effort
from autopar.intraop.improve import Assignment
from autopar.intraop.memory import BudgetResult, Earlier, minimise_within_budget
from autopar.intraop.problem import IntraOpProblem

SMALL = 10_000
"""Edge entries: of programs up to here a part takes hundredths of a second."""
_MAX_PARTS = 48

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    """The program with fewer strategies, by node; `number` only breaks ties."""

    bound: float
    number: int
    allowed: dict[int, Mask] = field(compare=False)


def is_small(problem: IntraOpProblem) -> bool:
    return sum(r_uv.size for r_uv in problem.edge_seconds) <= SMALL


def branch(
    problem: IntraOpProblem,
    known: BudgetResult,
    earlier: Earlier,
    effort: Effort,
    target_gap: float,
) -> BudgetResult:
    """What the walk knows, with a better assignment or bound: until target_gap (relative), the
    deadline or 48 parts. earlier: of the walk."""
    best, number = known.best, 0
    open_parts: list[_Part] = []
    closed = np.inf  # the least bound of parts that are not split further

    def split(part: _Part, seen: Earlier) -> None:
        """Into two, if there is a node to do it at."""
        nonlocal closed, number
        v, cut = _place(problem, seen)
        if v is None:
            closed = min(closed, part.bound)
            return
        allowed = part.allowed.get(v, np.isfinite(problem.node_seconds[v]))
        for side in (problem.node_bytes[v] <= cut, problem.node_bytes[v] > cut):
            if (allowed & side).any():
                number += 1
                heappush(open_parts, _Part(part.bound, number, {**part.allowed, v: allowed & side}))

    split(_Part(known.bound, 0, {}), earlier)
    for _ in range(_MAX_PARTS):
        if not open_parts or time.monotonic() > effort.deadline:
            break
        if best is not None and _meet(open_parts[0].bound, best, target_gap):
            break
        part = heappop(open_parts)
        own = Earlier()
        try:
            found = minimise_within_budget(_restricted(problem, part), effort=effort, earlier=own)
        except NoFeasiblePlan:
            continue
        if found.best is not None and (best is None or found.best.seconds < best.seconds):
            best = found.best
        part = replace(part, bound=max(part.bound, found.bound))
        if best is not None and _meet(part.bound, best, target_gap):
            closed = min(closed, part.bound)
        else:
            split(part, own)
    left = min([closed, *(part.bound for part in open_parts)])
    if best is not None:
        left = min(left, best.seconds)
    return replace(known, best=best, bound=max(known.bound, left))


def _meet(bound: float, best: Assignment, target_gap: float) -> bool:
    return best.seconds - bound <= target_gap * abs(bound)


def _restricted(problem: IntraOpProblem, part: _Part) -> IntraOpProblem:
    seconds = list(problem.node_seconds)
    for v, mask in part.allowed.items():
        seconds[v] = np.where(mask, seconds[v], np.inf)
    return replace(problem, node_seconds=tuple(seconds))


def _place(problem: IntraOpProblem, seen: Earlier) -> tuple[int | None, float]:
    """The node to split at, and the bytes between its sides; None where A and B do not differ."""
    points = [*seen.points, *filter(None, [seen.lightest])]
    over = [point for point in points if not problem.fits(point.bytes)]
    within = [point for point in points if problem.fits(point.bytes)]
    if not over or not within:
        return None, 0.0
    a = min(over, key=lambda point: point.bytes).choice
    b = min(within, key=lambda point: point.seconds).choice
    pairs = [(m_v[s], m_v[t]) for m_v, s, t in zip(problem.node_bytes, a, b, strict=True)]
    v = max(range(len(pairs)), key=lambda i: abs(pairs[i][0] - pairs[i][1]))
    first, second = pairs[v]
    return (v if first != second else None), float(first + second) / 2
