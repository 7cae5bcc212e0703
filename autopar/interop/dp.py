"""Solve the inter-op program: dynamic programs inside an interval branch and bound.

For one bound t on the stages' seconds a dynamic program (``program``) gives, for every number of
stages s at once,
   S_s(t) = the least sum of s stages, none above t
   T_s*   = min over candidates t of  S_s(t) + fill t            (Alpa, OSDI'22, section 5.2)
   fill   = B - 1, and more under schedules with smaller bubbles: T* = bubble min_s T_s*
S_s is non-increasing, so among the candidates a < t < b no step is below S_s(b) + fill next(a):
intervals are taken best bound first, trimmed for each s by what it can still gain, and halved. A
probe at t gives a solution whose own maximum tau <= t, and S_s(tau) = S_s(t): the candidates in
[tau, t] need no more probes. All s share the probes, as their best t are close to each other:
stages of K / s layers on D / s devices. Exact for relative_gap = 0.

The search starts at the least t for which there are enough devices: there programs are cheapest.
Its solutions limit the candidates from above.

Complexity: a few times log2(candidates) programs, candidates = O(F K^2 M); see ``program``. Entries
that the caller sets to inf (a band of layers per device, say) cost nothing. Seconds throughout.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from autopar.errors import NoFeasiblePlan, OptionError
from autopar.interop.infeasible import explain_infeasible
from autopar.interop.problem import (
    FloatArray,
    InterOpProblem,
    InterOpSolution,
    SolveStats,
    StageChoice,
)
from autopar.interop.program import Program, run_program
from autopar.interop.tables import CostTables, IntArray

# The least t with enough devices is bracketed this closely, many bounds at a time, before the
# first program; then t grows by so much until some number of stages is feasible.
_BRACKET = 1.01
_HALVINGS = 5  # of the ratio of two bounds: 32 steps from one to the other


def solve(problem: InterOpProblem, *, relative_gap: float = 0.0) -> InterOpSolution:
    """The best stages, proved within relative_gap of the optimum; the fewest of equal ones.

    Raises NoFeasiblePlan, which says what binds: a layer, the devices, the pinned number of stages
    or the microbatches in flight.
    """
    found = solve_each_count(problem, relative_gap=relative_gap, within=1.0)
    return min(found.values(), key=lambda solution: solution.seconds)


def solve_each_count(
    problem: InterOpProblem, *, relative_gap: float = 0.0, within: float = math.inf
) -> dict[int, InterOpSolution]:
    """The best stages for each feasible number of stages whose step is at most `within` times the
    best of all, proved within relative_gap of that number's optimum. Raises as `solve` does."""
    if not (math.isfinite(relative_gap) and relative_gap >= 0):
        raise OptionError(f"relative_gap is finite and >= 0: got {relative_gap}")
    search = _Search(CostTables.of(problem), 1 + relative_gap, within)
    if not search.run():
        raise NoFeasiblePlan(explain_infeasible(problem, feasible_counts))
    limit_s = within * search.best_s
    return {
        num_stages: InterOpSolution(
            stages=found.stages,
            seconds=problem.bubble * found.step_s,
            t_max=found.t_max,
            stats=SolveStats(
                len(search.candidates),
                search.num_programs,
                problem.bubble * found.step_s / search.slack,
            ),
        )
        for num_stages, found in sorted(search.best.items())
        if found.step_s <= limit_s
    }


def feasible_counts(problem: InterOpProblem) -> list[int]:
    """The numbers of stages, within the pins, for which some cut is feasible."""
    program = run_program(CostTables.of(problem), math.inf)
    if program is None:
        return []
    counts = range(problem.min_stages, problem.stage_limit + 1)
    return [s for s in counts if np.isfinite(program.sums[s])]


@dataclass(frozen=True, slots=True)
class _Found:
    stages: tuple[StageChoice, ...]
    sum_s: float
    t_max: float
    step_s: float


@dataclass(slots=True, eq=False)
class _Search:
    """Branch and bound over open intervals of candidate indices; a builder local to one solve.

    An interval has one low end and a high end for each number of stages, none of whose S_s is below
    sums[s]. Arrays [S+1] are by number of stages.
    """

    tables: CostTables
    slack: float  # 1 + relative gap
    within: float
    best: dict[int, _Found] = field(default_factory=dict)
    num_programs: int = 0
    candidates: FloatArray = field(default_factory=lambda: np.empty(0))
    fill: FloatArray = field(default_factory=lambda: np.empty(0))  # fill t of each candidate t
    heap: list[tuple[float, int, int, IntArray, FloatArray]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    @property
    def best_s(self) -> float:
        return min((found.step_s for found in self.best.values()), default=math.inf)

    def limits(self) -> FloatArray:
        """What a new step of each number of stages has to be below."""
        problem = self.tables.problem
        limits = np.full(problem.stage_limit + 1, -math.inf)
        limits[problem.min_stages :] = self.within * self.best_s
        for num_stages, found in self.best.items():
            limits[num_stages] = min(limits[num_stages], found.step_s)
        return limits

    def run(self) -> bool:
        """Probe until no interval can gain more than the gap. False where nothing is feasible."""
        if not self._start():
            return False
        while self.heap:
            _, _, low, highs, sums = heapq.heappop(self.heap)
            highs = self._trimmed(low, highs, sums)
            high = int(highs.max())
            if high > low + 1:  # halved by value: candidates are dense where no optimum is
                between = self.candidates[low + 1 : high]
                half = int(np.searchsorted(between, (between[0] + between[-1]) / 2))
                self._split(low + 1 + min(half, len(between) - 1), low, highs, sums)
        return True

    def _start(self) -> bool:
        """First solutions, the candidates, and the probe above all of them."""
        tables, problem = self.tables, self.tables.problem
        if tables.all_used < 0 or problem.min_stages > problem.stage_limit:
            return False
        least_sum_s = float(tables.prefix_sums(math.inf)[-1, -1])
        if math.isinf(least_sum_s):
            return False
        finite = tables.least[np.isfinite(tables.least)]
        ceiling = float(finite.max())
        infeasible, t = _bracket(tables, least_sum_s / problem.stage_limit, ceiling)
        growth = _BRACKET
        while not self.best:
            self._probe(t, math.inf, np.full(problem.stage_limit + 1, True))
            if t == math.inf and not self.best:
                return False
            t, growth = t * growth, growth * growth
            t = t if t < ceiling else math.inf
        fill = problem.fill
        top = (self.within * self.best_s / self.slack - least_sum_s) / fill if fill else math.inf
        self.candidates = tables.candidates(infeasible, top)
        if not fill:  # S alone counts
            self.candidates = self.candidates[-1:]
        self.fill = fill * self.candidates
        if self.candidates.size:
            size, shape = len(self.candidates), problem.stage_limit + 1
            self._split(size - 1, -1, np.full(shape, size), np.full(shape, least_sum_s))
        return True

    def _trimmed(self, low: int, highs: IntArray, sums: FloatArray) -> IntArray:
        """High ends without what gains nothing."""
        known = np.isfinite(sums)
        gain = np.where(known, self.limits() / self.slack - np.where(known, sums, 0), -math.inf)
        useful = np.searchsorted(self.fill, gain)
        trimmed: IntArray = np.minimum(highs, useful)
        return trimmed

    def _push(self, low: int, highs: IntArray, sums: FloatArray) -> None:
        """An interval. Its low end moves up: no stage below sum / s seconds makes the sum."""
        live = (highs > low + 1) & np.isfinite(sums)
        if live.any():
            num_stages = np.arange(len(sums))[live]
            least = float((sums[live] / num_stages).min()) * (1 - 1e-12)  # rounding of the sum
            low = max(low, int(np.searchsorted(self.candidates, least)) - 1)
            if int(highs[live].max()) > low + 1:
                bound = float(sums[live].min() + self.fill[low + 1])
                highs = np.where(live, highs, 0)
                heapq.heappush(self.heap, (bound, next(self._order), low, highs, sums))

    def _split(self, middle: int, low: int, highs: IntArray, sums: FloatArray) -> None:
        gain = self.limits() / self.slack - self.fill[low + 1]
        live = (highs > low + 1) & (sums < gain)
        if not live.any():
            return
        found_sums, t_max = self._probe(
            float(self.candidates[middle]), float(gain[live].max()), live & (gain > 0), gain
        )
        left = np.minimum(highs, np.searchsorted(self.candidates, t_max))
        self._push(low, left, found_sums)
        self._push(middle, highs, sums)

    def _probe(
        self,
        t_max: float,
        cap_s: float,
        live: np.ndarray,
        useful_s: FloatArray | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """S_s(t_max), inf where of no use, and the maximum of the stages that have it."""
        self.num_programs += 1
        shape = self.tables.problem.stage_limit + 1
        sums, slowest = np.full(shape, math.inf), np.full(shape, -math.inf)
        program = run_program(self.tables, t_max, cap_s, int(np.flatnonzero(live).max()))
        if program is None:
            return sums, slowest
        for s in np.flatnonzero(live[: len(program.sums)]).tolist():
            if s >= self.tables.problem.min_stages and np.isfinite(program.sums[s]):
                if useful_s is not None and program.sums[s] >= useful_s[s]:
                    continue
                found = self._found(program, s)
                sums[s], slowest[s] = found.sum_s, found.t_max
                if s not in self.best or found.step_s < self.best[s].step_s:
                    self.best[s] = found
        return sums, slowest

    def _found(self, program: Program, num_stages: int) -> _Found:
        stages = program.stages(num_stages)
        slowest = max(stage.seconds for stage in stages)
        sum_s = float(program.sums[num_stages])
        fill = self.tables.problem.fill
        return _Found(stages, sum_s, slowest, sum_s + fill * slowest)


def _bracket(tables: CostTables, low: float, high: float) -> tuple[float, float]:
    """A bound t for which there are too few devices, and one for which there are enough, within a
    factor of _BRACKET. No t below low holds, high does."""
    devices = sum(tables.problem.num_devices)
    low /= _BRACKET
    if low <= 0:  # stages for nothing: no ratio is small
        return -math.inf, high
    while high > low * _BRACKET:
        step = high / low  # by square roots, which are the same everywhere; powers are not
        for _ in range(_HALVINGS):
            step = math.sqrt(step)
        tried = low * np.cumprod([1.0, *[step] * (2**_HALVINGS - 1)], dtype=np.float64)
        tried = np.append(tried, high)
        enough = tables.fewest_devices(tried) <= devices
        first = max(1, int(enough[:-1].argmax()) if enough[:-1].any() else len(tried) - 1)
        low, high = float(tried[first - 1]), float(tried[first])
    return low, high
