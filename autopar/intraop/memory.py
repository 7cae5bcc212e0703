"""The program with a budget: memory is a Lagrange multiplier, not a row.

    L(l) = min_x  sum_v [c_v + l m_v] . x_v + sum x_u' R_uv x_v  - l M
    L(l) <= optimum for every l >= 0

    A = solve(l = 0); if A fits, done.   B = a fast one among the lightest assignments
    repeat  l = slope of A..B;  C = solve(l);  C replaces A (does not fit) or B (fits)
            until C is on the line A..B (then L is maximal) or the gap is small
    nodes where A and B differ: each connected part is an independent switch, taken by seconds
    while it fits; then single nodes move while that saves seconds and fits

The stated gap is best seconds against max L(l). Seconds, bytes; l in seconds per byte. At most 16
solves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.intraop.free import Effort, FreeResult, Priced, Worth, minimise
from autopar.intraop.ilp import infeasible
from autopar.intraop.improve import Assignment, Neighbourhood
from autopar.intraop.problem import FloatArray, IntraOpProblem, least_bytes, relative_gap
from autopar.intraop.sweep import WarmMessages

STEP_TABLE_LIMIT = 1_000_000
"""Largest elimination table within one step on the hull: more certainty is not worth its time
there.
"""
STEP_CLOSE_ENOUGH = 2e-4
"""Relative gap at which the sweeps of one step stop; it is part of the stated gap."""
STEP_SWEEPS = 80
"""Of one round of a step: messages go on from there in the next."""
_FIRST_SLOPE = 0.1
"""Of the slope to the lightest assignment: the hull is convex, so it is flatter at the budget, and
messages crawl where a byte costs too much."""
_ROUGH = 0.05
"""Relative gap at which the lightest assignment, where the walk starts, is fast enough."""
_MAX_STEPS = 14
_SMALL_GAP = 2.5e-3
"""Walking the hull stops here: the primal is found by switches, and the bound is good enough."""
_NEAR = 0.05
"""Single-node moves are tried on the way only when they may end the walk: from a gap below 5 %."""
_ON_LINE = 1e-9


@dataclass(frozen=True, slots=True)
class BudgetResult:
    """best: an assignment that fits, or None. bound: max L(l), reached at multiplier (seconds per
    byte).
    """

    best: Assignment | None
    bound: float
    multiplier: float
    multipliers: tuple[float, ...]
    sweeps: int
    fixed: int
    largest_table: int


@dataclass(slots=True)
class Earlier:
    """What is known of one program whatever its budget (a builder, local to its solves): optimal
    assignments at multipliers, min over x of c + l m by l, and messages to start from."""

    points: list[Assignment] = field(default_factory=list)
    lines: list[tuple[float, float]] = field(default_factory=list)  # (l, lower bound of c + l m)
    warm: WarmMessages = field(default_factory=dict)
    lightest: Assignment | None = None
    priced: Priced | None = None

    def note(self, problem: IntraOpProblem, multiplier: float, found: FreeResult) -> None:
        self.lines.append((multiplier, found.bound))
        if found.choice is not None:
            self.points.append(Assignment.of(problem, found.choice))

    def bound(self, budget_bytes: float) -> tuple[float, float]:
        """(max over l of L(l), that l): no assignment within the budget takes fewer seconds."""
        return max(
            ((float(value - rate * budget_bytes), rate) for rate, value in self.lines),
            default=(-np.inf, 0.0),
        )

    def in_vain(self, worth: Worth | None) -> bool:
        """Whether no assignment is worth it."""
        return worth is not None and self.bound(worth.budget_bytes)[0] > worth.seconds


class _Walk:
    """The points seen so far (a builder, local to one solve)."""

    def __init__(self, problem: IntraOpProblem, effort: Effort, earlier: Earlier) -> None:
        assert problem.budget_bytes is not None
        self.problem, self.effort = problem, effort
        self.budget = problem.budget_bytes
        self.earlier = earlier
        self.bound, self.multiplier = earlier.bound(self.budget)
        self.best: Assignment | None = None
        self.tried: list[float] = []
        self.sweeps = self.fixed = self.largest = 0
        for point in earlier.points:
            self.offer(point)

    def note(self, found: FreeResult) -> Assignment | None:
        self.sweeps += found.sweeps
        self.fixed += found.fixed
        self.largest = max(self.largest, found.largest_table)
        if found.choice is None:
            return None
        point = Assignment.of(self.problem, found.choice)
        self.offer(point)
        return point

    def offer(self, point: Assignment) -> None:
        if self.problem.fits(point.bytes) and (
            self.best is None or point.seconds < self.best.seconds
        ):
            self.best = point

    def solve(self, multiplier: float) -> Assignment | None:
        """argmin of L(multiplier); its bound counts."""
        if self.earlier.priced is None:
            self.earlier.priced = Priced(self.problem)
        priced = self.earlier.priced
        found = priced.minimise(multiplier, effort=self.effort, warm=self.earlier.warm)
        self.earlier.note(self.problem, multiplier, found)
        self.tried.append(multiplier)
        lagrangian = found.bound - multiplier * self.budget
        if lagrangian > self.bound:
            self.bound, self.multiplier = lagrangian, multiplier
        return self.note(found)

    def lightest(self) -> Assignment | None:
        """A fast assignment in which every node takes its least bytes; None where forbidden pairs
        clash.
        """
        unary: list[FloatArray] = []
        for c_v, m_v in zip(self.problem.node_seconds, self.problem.node_bytes, strict=True):
            least = m_v[np.isfinite(c_v)].min()
            unary.append(np.where(m_v <= least, c_v, np.inf))
        rough = replace(self.effort, close_enough=_ROUGH, near=_ROUGH, max_sweeps=STEP_SWEEPS // 8)
        self.earlier.lightest = self.note(minimise(self.problem, unary, effort=rough))
        return self.earlier.lightest

    def gap(self) -> float:
        return np.inf if self.best is None else relative_gap(self.best.seconds, self.bound)

    def result(self) -> BudgetResult:
        return BudgetResult(
            best=self.best,
            bound=self.bound,
            multiplier=self.multiplier,
            multipliers=tuple(self.tried),
            sweeps=self.sweeps,
            fixed=self.fixed,
            largest_table=self.largest,
        )


def minimise_within_budget(
    problem: IntraOpProblem, *, effort: Effort, earlier: Earlier | None = None
) -> BudgetResult:
    """The module docstring's walk. Raises NoFeasiblePlan with the least bytes; needs a budget.
    earlier: of the same program under other budgets, used and added to."""
    least = least_bytes(problem)
    if not problem.fits(least.bytes):
        raise infeasible(problem, least=least.bytes, exact=least.exact)
    walk = _Walk(problem, effort, Earlier() if earlier is None else earlier)
    heavy, light = _bracket(walk)
    if heavy is None:
        heavy = walk.solve(0.0)
        if heavy is None and walk.bound == np.inf:
            raise infeasible(problem.with_budget(None))
        if heavy is None:
            return walk.result()
    if problem.fits(heavy.bytes):
        return walk.result()
    if light is None:
        light = walk.lightest() or walk.note(_lightest_exact(problem, effort))
        if light is None or not problem.fits(light.bytes):
            return walk.result()
    _walk_hull(walk, heavy, light, Neighbourhood(problem))
    return walk.result()


def _bracket(walk: _Walk) -> tuple[Assignment | None, Assignment | None]:
    """The known points next to the budget: the lightest that does not fit, and the heaviest that
    does; the fastest of all twice if it fits."""
    points = walk.earlier.points
    fastest = min(points, key=lambda p: p.seconds, default=None)
    if fastest is None or walk.problem.fits(fastest.bytes):
        return fastest, fastest
    fitting = [p for p in points if walk.problem.fits(p.bytes)]
    others = [p for p in points if not walk.problem.fits(p.bytes)]
    light = min(fitting, key=lambda p: p.seconds, default=walk.earlier.lightest)
    if light is not None and not walk.problem.fits(light.bytes):
        light = None
    return min(others, key=lambda p: p.bytes), light


def _walk_hull(walk: _Walk, heavy: Assignment, light: Assignment, around: Neighbourhood) -> None:
    """Narrow heavy (too many bytes) and light (fits) on the lower hull of (bytes, seconds); offer
    what lies between.
    """
    stop = min(_SMALL_GAP, walk.effort.target_gap)
    flat = False
    for _ in range(_MAX_STEPS):
        if time.monotonic() > walk.effort.deadline or walk.earlier.in_vain(walk.effort.worth):
            break
        slope = (light.seconds - heavy.seconds) / (heavy.bytes - light.bytes)
        if slope <= 0:
            break
        first = False
        if light is walk.earlier.lightest and not flat:
            flat = first = True
            slope *= _FIRST_SLOPE
        middle = walk.solve(slope)
        if middle is None:
            break
        line = light.seconds + slope * light.bytes
        below = line - (middle.seconds + slope * middle.bytes)
        if walk.problem.fits(middle.bytes):
            light = middle
        else:
            heavy = middle
        mixed = around.switch_parts(light, heavy)
        walk.offer(mixed)
        if relative_gap(mixed.seconds, walk.bound) <= _NEAR:
            walk.offer(around.move_nodes(mixed))
        if walk.gap() <= stop or (below <= _ON_LINE * abs(line) and not first):
            break
    if walk.earlier.in_vain(walk.effort.worth):
        return
    walk.offer(around.move_nodes(around.switch_parts(light, heavy)))
    if walk.best is not None:
        walk.offer(around.move_nodes(around.switch_parts(walk.best, heavy)))


def _lightest_exact(problem: IntraOpProblem, effort: Effort) -> FreeResult:
    """Least bytes without forbidden parts, by the same solver. Raises NoFeasiblePlan if above the
    budget.
    """
    zero: dict[int, FloatArray] = {}
    for r_uv in problem.edge_seconds:
        if id(r_uv) not in zero:
            zero[id(r_uv)] = np.where(np.isfinite(r_uv), 0.0, np.inf)
    pairs = zip(problem.node_seconds, problem.node_bytes, strict=True)
    m = tuple(np.where(np.isfinite(c_v), m_v, np.inf) for c_v, m_v in pairs)
    bytes_only = IntraOpProblem(
        node_names=problem.node_names,
        node_seconds=m,
        node_bytes=problem.node_bytes,
        edges=problem.edges,
        edge_seconds=tuple(zero[id(r_uv)] for r_uv in problem.edge_seconds),
    )
    exact = Effort(deadline=effort.deadline, target_gap=0.0, allow_mip=True)
    found = minimise(bytes_only, m, effort=exact)
    if not problem.fits(found.bound):
        closed = relative_gap(found.value, found.bound) <= _ON_LINE
        raise infeasible(problem, least=found.bound, exact=closed)
    return found
