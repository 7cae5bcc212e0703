"""Solve the inter-op program: dynamic programming inside an interval branch and bound.

For one bound t on the stages' seconds, counted from the end so that in-flight is known,
   F(0, K, 0; t) = 0
   F(s, k, d; t) = min over n layers, submesh m with c <= t of  c + F(s-1, k+n, d - D_m; t)
                   c = stage_seconds[f_s - 1, k, k+n-1, m] + transfer_seconds[k, m]
   S(t)          = min over s in min_stages..max_stages of F(s, 0, D; t)
   T*            = min over candidates t of  S(t) + (B - 1) t        (Alpa, OSDI'22, section 5.2)
S is non-increasing, so among the candidates a < t < b no step is below S(b) + (B - 1) next(a):
intervals are taken best bound first, trimmed by the incumbent and halved. A probe at t gives a
solution whose own maximum tau <= t, and S(tau) = S(t): the candidates in [tau, t] need no more
probes. A probe drops the states whose F plus a bound on the stages before them (``tables``) cannot
lead to an improvement. Exact for relative_gap = 0.

Complexity: one program O(S K^2 D M) time, O(S K D) memory, in O(S K) numpy calls, with M distinct
device counts (of choices with equal counts only the cheapest matters) and D in units of their
common divisor; a few times log2(candidates) programs are run, candidates = O(F K^2 M), most of them
cut short. Entries that the caller sets to inf (a band of layers per device, say) are skipped by
whole diagonals. Seconds throughout.
"""

from __future__ import annotations

import heapq
import math
import sys
from dataclasses import dataclass, field

import numpy as np

from autopar.errors import InternalError, NoFeasiblePlan, OptionError
from autopar.interop.infeasible import explain_infeasible
from autopar.interop.problem import (
    FloatArray,
    InterOpProblem,
    InterOpSolution,
    SolveStats,
    StageChoice,
)
from autopar.interop.tables import CostTables


def solve(problem: InterOpProblem, *, relative_gap: float = 0.0) -> InterOpSolution:
    """The best stages, proved within relative_gap of the optimum; the first of equal ones, always.

    Raises NoFeasiblePlan, which says what binds: a layer, the devices, the pinned number of stages
    or the microbatches in flight.
    """
    if not (math.isfinite(relative_gap) and relative_gap >= 0):
        raise OptionError(f"relative_gap is finite and >= 0: got {relative_gap}")
    tables = CostTables.of(problem)
    best = _probe(tables, math.inf) if tables.candidates.size else None
    if best is None:
        raise NoFeasiblePlan(
            explain_infeasible(problem, lambda p: _probe(CostTables.of(p), math.inf) is not None)
        )
    search = _Search(tables, best, 1 + relative_gap)
    search.push(-1, tables.index(best.t_max), best.sum_s)
    search.run()
    lower_bound_s = search.best.step_s / search.slack
    return InterOpSolution(
        stages=search.best.stages,
        seconds=search.best.step_s,
        t_max=search.best.t_max,
        stats=SolveStats(len(tables.candidates), search.num_programs, lower_bound_s),
    )


@dataclass(frozen=True, slots=True)
class _Incumbent:
    stages: tuple[StageChoice, ...]
    sum_s: float
    t_max: float
    step_s: float


def _probe(tables: CostTables, t_max: float, cap_s: float = math.inf) -> _Incumbent | None:
    """The stages of S(t_max), or None where S(t_max) > cap_s (or is infinite)."""
    problem = tables.problem
    if tables.units < 0 or problem.min_stages > problem.stage_limit:
        return None
    prefix = tables.prefix_bound(t_max)
    cap_s *= 1 + 1e-12  # sums are rounded in another order
    if not prefix[-1, -1] <= min(cap_s, sys.float_info.max):
        return None
    rest = prefix[:, ::-1]  # rest[k, d] bounds the stages before layer k when d units are used
    most = np.where(np.isfinite(rest), cap_s - np.nan_to_num(rest), -math.inf)
    table = _program(tables, t_max, most)
    sums = table[problem.min_stages :, 0, tables.units]
    num_stages = problem.min_stages + int(np.argmin(sums))
    if not np.isfinite(table[num_stages, 0, tables.units]):
        return None
    stages = _backtrack(tables, table, t_max, num_stages)
    slowest = max(stage.seconds for stage in stages)
    sum_s = float(table[num_stages, 0, tables.units])
    step_s = sum_s + (problem.num_microbatches - 1) * slowest
    return _Incumbent(stages, sum_s, slowest, step_s)


def _program(tables: CostTables, t_max: float, most: FloatArray) -> FloatArray:
    """F(s, k, d; t_max) as an array [S+1, K+1, units+1]; inf where it is above most[k, d]."""
    problem, units = tables.problem, tables.units
    layers, limit = problem.num_layers, problem.stage_limit
    table = np.full((limit + 1, layers + 1, units + 1), math.inf)
    table[0, layers, 0] = 0.0
    bounded = {f: np.where(c <= t_max, c, math.inf) for f, c in tables.cost.items()}
    lengths = {f: 1 + np.flatnonzero(np.isfinite(c).any(axis=(0, 2))) for f, c in bounded.items()}
    shifted = np.full((len(tables.unit_counts), layers + 1, units + 1), math.inf)
    for s in range(1, limit + 1):
        reached, used = np.nonzero(np.isfinite(table[s - 1]))
        if not reached.size:
            break
        lowest = used.min() + tables.unit_counts[0]
        span = slice(lowest, used.max() + tables.unit_counts[-1] + 1)
        for g, count in enumerate(tables.unit_counts):
            shifted[g, :, count:] = table[s - 1, :, : max(units + 1 - count, 0)]
        cost = bounded[problem.in_flight[s - 1]]
        for n in lengths[problem.in_flight[s - 1]]:
            start, stop = max(int(reached[0] - n), 0), int(reached[-1] - n) + 1
            if stop > start:
                sums = cost[:, n - 1, start:stop, None] + shifted[:, start + n : stop + n, span]
                rows = table[s, start:stop, span]
                np.minimum(rows, sums.min(axis=0), out=rows)
        table[s][table[s] > most] = math.inf
    return table


def _backtrack(
    tables: CostTables, table: FloatArray, t_max: float, num_stages: int
) -> tuple[StageChoice, ...]:
    """The path that made F(num_stages, 0, D): each step looks for the sum that was found."""
    problem, stages = tables.problem, list[StageChoice]()
    k, d = 0, tables.units
    for s in range(num_stages, 0, -1):
        f = problem.in_flight[s - 1]
        found = _step(tables, table, t_max, (s, k, d))
        if found is None:
            raise InternalError(f"the dynamic program has no path to F({s}, {k}, {d})")
        g, n = found
        count = tables.unit_counts[g]
        seconds = float(tables.cost[f][g, n - 1, k])
        c_m = problem.stage_seconds[f - 1, k, k + n - 1] + problem.transfer_seconds[k]
        unit = problem.num_devices // tables.units
        same = np.array(problem.submesh_devices) == count * unit
        submesh = int(np.flatnonzero(same & (c_m == seconds))[0])
        stages.append(StageChoice(k, k + n - 1, submesh, f, seconds))
        k, d = k + n, d - count
    return tuple(stages)


def _step(
    tables: CostTables, table: FloatArray, t_max: float, state: tuple[int, int, int]
) -> tuple[int, int] | None:
    """(g, n) of the last step into F(s, k, d), or None."""
    s, k, d = state
    cost = tables.cost[tables.problem.in_flight[s - 1]]
    for g, count in enumerate(tables.unit_counts):
        if count <= d:
            longest = tables.problem.num_layers - k
            c_n = cost[g, :longest, k]
            hit = (c_n <= t_max) & (c_n + table[s - 1, k + 1 :, d - count] == table[s, k, d])
            if hit.any():
                return g, 1 + int(np.argmax(hit))
    return None


@dataclass(slots=True, eq=False)
class _Search:
    """Branch and bound over open intervals of candidate indices; a builder local to one solve."""

    tables: CostTables
    best: _Incumbent
    slack: float  # 1 + relative gap
    num_programs: int = 1
    heap: list[tuple[float, int, int, float]] = field(default_factory=list)

    def push(self, low: int, high: int, sum_s: float) -> None:
        """Add the candidates strictly between two indices, all of whose S are at least sum_s.

        Its low end moves up to sum_s / stage_limit: fewer seconds a stage cannot make the sum.
        """
        least = sum_s / self.tables.problem.stage_limit * (1 - 1e-12)  # rounding of the sum
        low = max(low, self.tables.index(least) - 1)
        if low + 1 < high:
            bound = sum_s + float(self.tables.fill[low + 1])
            heapq.heappush(self.heap, (bound, low, high, sum_s))

    def run(self) -> None:
        """Probe until no interval can beat the incumbent by more than the gap."""
        while self.heap:
            bound, low, high, sum_s = heapq.heappop(self.heap)
            if bound * self.slack >= self.best.step_s:
                return
            steps = sum_s + self.tables.fill[low + 1 : high]
            useful = int(np.searchsorted(steps * self.slack, self.best.step_s))
            self._split(low, low + 1 + useful, sum_s)

    def _split(self, low: int, high: int, sum_s: float) -> None:
        middle = (low + high) // 2
        self.num_programs += 1
        useful_s = self.best.step_s / self.slack - float(self.tables.fill[low + 1])
        found = _probe(self.tables, float(self.tables.candidates[middle]), useful_s)
        if found is not None:
            if found.step_s < self.best.step_s:
                self.best = found
            self.push(low, self.tables.index(found.t_max), found.sum_s)
        self.push(middle, high, sum_s)
