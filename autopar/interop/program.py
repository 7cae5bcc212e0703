"""One dynamic program of the inter-op pass: for a bound t on the stages' seconds, all stage counts.

Counted from the end so that in-flight is known, with d the state of used devices (``tables``),
   F(0, K, 0; t) = 0
   F(s, k, d; t) = min over n layers, size z with c <= t of  c + F(s-1, k+n, d - D_z; t)
A state is kept only where F plus the bound on the stages before it is within a cap: for each k an
interval of d, narrow where t is close to the least feasible one, and an interval of s.

Complexity: O(S K^2 D Z) time at most, in O(K^2 Z) numpy calls over [stages, states] blocks; the
intervals leave a fraction of it. Memory O(S K D). Seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InternalError
from autopar.interop.problem import FloatArray, StageChoice
from autopar.interop.tables import CostTables, IntArray, intervals

# Elements of a block: about what a core's own cache holds.
_BLOCK = 1 << 15
_FAR = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """F(s, k, d; t_max) as table[k, s, d]; inf where it is of no use."""

    tables: CostTables
    t_max: float
    table: FloatArray

    @property
    def sums(self) -> FloatArray:
        """[S+1]: the least sum of s stages, or inf."""
        return self.table[0, :, self.tables.all_used]

    def stages(self, num_stages: int) -> tuple[StageChoice, ...]:
        """The path that made the sum: each step looks for the sum that was found."""
        tables, stages = self.tables, list[StageChoice]()
        k, d = 0, tables.all_used
        for s in range(num_stages, 0, -1):
            r = tables.rows[s - 1]
            c_zn = tables.cost[k, :, : tables.problem.num_layers - k, r]
            before = d - tables.steps
            left = self.table[k + 1 :, s - 1, np.maximum(before, 0)].T
            hit = (c_zn + left == self.table[k, s, d]) & (c_zn <= self.t_max)
            hit &= (before >= 0)[:, None]
            if not hit.any():
                raise InternalError(f"the dynamic program has no path to F({s}, {k}, {d})")
            z, n = np.unravel_index(int(hit.argmax()), hit.shape)
            flight = tables.problem.in_flight[s - 1]
            submesh, seconds = int(tables.choice[k, z, n, r]), float(c_zn[z, n])
            stages.append(StageChoice(k, k + int(n), submesh, flight, seconds))
            k, d = k + int(n) + 1, int(before[z])
        return tuple(stages)


def run_program(
    tables: CostTables, t_max: float, cap_s: float = math.inf, most_stages: int | None = None
) -> Program | None:
    """The program for sums up to cap_s of up to most_stages stages; None where there is none."""
    layers, goal = tables.problem.num_layers, tables.all_used
    limit = tables.problem.stage_limit if most_stages is None else most_stages
    if goal < 0 or limit < 1:
        return None
    cap_s *= 1 + 1e-12  # sums are rounded in another order
    rest = tables.prefix_sums(t_max)[:, ::-1]  # bounds the stages before layer k, given d
    if math.isinf(rest[layers, 0]) or rest[layers, 0] > cap_s:
        return None
    known = np.isfinite(rest) & (rest <= cap_s)
    most = np.where(known, cap_s - np.where(known, rest, 0), -math.inf)
    lowest, highest = intervals(known)
    table = np.full((layers + 1, limit + 1, goal + 1), math.inf)
    table[layers, 0, 0] = 0.0
    fewest, largest = np.full(layers + 1, limit + 1), np.full(layers + 1, -1)
    fewest[layers] = largest[layers] = 0
    highest[layers] = 1
    rows, steps = tables.rows[:limit], tables.steps.tolist()
    for k in range(layers - 1, -1, -1):
        target, later, length = table[k], table[k + 1 :], layers - k
        c_znr = np.where(tables.cost[k, :, :length] <= t_max, tables.cost[k, :, :length], math.inf)
        low = np.maximum(lowest[k], lowest[k + 1 :] + tables.steps[:, None])
        high = np.minimum(highest[k], highest[k + 1 :] + tables.steps[:, None])
        useful = (low < high) & (tables.least[k, :, :length] <= t_max) & (largest[k + 1 :] >= 0)
        last = limit - (k > 0)  # another stage comes before, unless k = 0
        for z, runs in enumerate(_runs(useful, low, high, fewest[k + 1 :], largest[k + 1 :])):
            for start, stop, a, b, few, many in runs:
                s = slice(few, min(many + 1, last))
                left = later[start:stop, s, a - steps[z] : b - steps[z]]
                sums = (left + c_znr[z, start:stop][:, rows[s], None]).min(axis=0)
                block = target[s.start + 1 : s.stop + 1, a:b]
                np.minimum(block, sums, out=block)
        target[target > most[k]] = math.inf
        reached = np.isfinite(target[:, lowest[k] : highest[k]])
        if reached.any():
            (fewest[k], above), (left, right) = (intervals(reached.any(axis=i)) for i in (1, 0))
            largest[k] = above - 1
            lowest[k], highest[k] = lowest[k] + left, lowest[k] + right
    return Program(tables, t_max, table)


def _runs(
    useful: NDArray[np.bool_], low: IntArray, high: IntArray, fewest: IntArray, largest: IntArray
) -> list[list[tuple[int, ...]]]:
    """For each size z, runs of n-1 to do at once: start and stop, the states that they lead to,
    the least and the most stages that follow. All useful ones where that makes a small block,
    which saves calls; one at a time where it does not, which saves work."""
    start, stop = intervals(useful)
    whole = np.stack(
        [
            start,
            stop,
            np.where(useful, low, _FAR).min(axis=1),
            np.where(useful, high, 0).max(axis=1),
            np.where(useful, fewest, _FAR).min(axis=1),
            np.where(useful, largest, -1).max(axis=1),
        ],
        axis=1,
    ).tolist()
    runs: list[list[tuple[int, ...]]] = []
    for z, (first, end, a, b, few, many) in enumerate(whole):
        if first == end:
            runs.append([])
        elif (end - first) * (b - a) * (many + 1 - few) <= _BLOCK:
            runs.append([(first, end, a, b, few, many)])
        else:
            n = np.flatnonzero(useful[z])
            columns = (n, n + 1, low[z, n], high[z, n], fewest[n], largest[n])
            runs.append(list(zip(*(column.tolist() for column in columns), strict=True)))
    return runs
