"""Cost tables of the inter-op program, grouped for the dynamic program, and a bound from them.

Of the submesh choices with equal devices of one node group only the cheapest matters, for the sum
and for the maximum, so choices become sizes z.

**States.** Used devices d = (d_1, .., d_G), of group g counted in the common divisor of its sizes,
u_g <= U_g, are one index  sum_g d_g R_g+1 .. R_G  with  R_g = U_g + 1 + the largest size of g. A
stage adds a constant to the index, and the room above U_g (none is needed in the first group) keeps
one stage too many from carrying into the next group: such states are not `valid`, and stay at inf.
With one group d is its own index.

**Bound.** It forgets the stage count and takes the cheapest in-flight row:
   G(0, 0; t) = 0
   G(k, d; t) = min over j < k, size z with c <= t of  c + G(j, d - D_z; t)     c = min over f cost
so G(k, d; t) <= the sum of any stages that hold layers 0..k-1 on d devices, none above t.

Complexity: tables O(F K^2 M), memory O(F K^2 Z); the bound O(K^2 D Z) in O(K Z) numpy calls.
Seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.interop.problem import FloatArray, InterOpProblem

IntArray = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class CostTables:
    """cost[k, z, n-1, r]: least c of n layers from k on size z, in the r-th row that is in use;
    choice: the submesh choice which that is. by_end[k, z, j]: least over r for layers j..k-1."""

    problem: InterOpProblem
    sizes: tuple[tuple[int, int], ...]  # [Z]: node group, devices
    steps: IntArray  # [Z], what a stage adds to the state
    all_used: int  # the state in which all devices are used; -1 where no sizes sum to it
    valid: NDArray[np.bool_]  # [all_used + 1]
    rows: IntArray  # [stage_limit]: r by stages from the end
    cost: FloatArray
    choice: NDArray[np.uint16]
    least: FloatArray  # [k, z, n-1]: min over r
    by_end: FloatArray

    @classmethod
    def of(cls, problem: InterOpProblem) -> CostTables:
        layers = problem.num_layers
        choices = list(zip(problem.submesh_groups, problem.submesh_devices, strict=True))
        sizes = sorted(set(choices))
        steps, all_used, valid = _states(problem, sizes)
        flights, rows = np.unique(problem.in_flight[: problem.stage_limit], return_inverse=True)
        cost = np.full((layers, len(sizes), layers, len(flights)), math.inf)
        choice = np.zeros(cost.shape, dtype=np.uint16)
        first, length = np.nonzero(np.tri(layers, dtype=bool)[::-1])  # first + length < layers
        for r, f in enumerate(flights):
            c_im = problem.row(int(f))[first, first + length] + problem.transfer_seconds[first]
            for z, size in enumerate(sizes):
                members = np.flatnonzero([c == size for c in choices])
                best = c_im[:, members].argmin(axis=1)
                cost[first, z, length, r] = c_im[np.arange(len(first)), members[best]]
                choice[first, z, length, r] = members[best]
        least = cost.min(axis=3, initial=math.inf)
        by_end = np.full((layers + 1, len(sizes), layers), math.inf)
        by_end[first + length + 1, :, first] = least[first, :, length]
        return cls(
            problem=problem,
            sizes=tuple(sizes),
            steps=steps,
            all_used=all_used,
            valid=valid,
            rows=rows,
            cost=cost,
            choice=choice,
            least=least,
            by_end=by_end,
        )

    def candidates(self, above: float, most: float) -> FloatArray:
        """What max_i t_i can be within (above, most], ascending."""
        kept = [c[(c > above) & (c <= most) & np.isfinite(c)] for c in self.cost]
        return np.unique(np.concatenate(kept))

    def fewest_devices(self, t_max: FloatArray) -> FloatArray:
        """Of all groups together, that stages not above t_max need: for each of [T] bounds."""
        devices = np.array([n for _, n in self.sizes], dtype=np.float64)
        need = np.full((self.problem.num_layers + 1, len(t_max)), math.inf)
        need[0] = 0.0
        for k in range(1, len(need)):
            fits = self.by_end[k, :, :k, None] <= t_max
            n_zjt = np.where(fits, need[:k] + devices[:, None, None], math.inf)
            need[k] = n_zjt.min(axis=(0, 1))
        return need[self.problem.num_layers, :]

    def prefix_sums(self, t_max: float) -> FloatArray:
        """G(k, d; t_max) as an array [K+1, all_used+1]."""
        layers, states = self.problem.num_layers, self.all_used + 1
        bound = np.full((layers + 1, states), math.inf)
        bound[0, :1] = 0.0
        useful = self.by_end <= t_max
        c_kzj = np.where(useful, self.by_end, math.inf)
        start, stop = intervals(useful)
        lowest, highest = [0] + [states] * layers, [1] + [0] * layers  # of what is finite
        steps = self.steps.tolist()
        for k in range(1, layers + 1):
            row = bound[k]
            for z in np.flatnonzero(start[k] < stop[k]).tolist():
                near, step = slice(start[k, z], stop[k, z]), steps[z]
                low, high = min(lowest[near]), min(max(highest[near]), states - step)
                if low < high:
                    sums = (bound[near, low:high] + c_kzj[k, z, near, None]).min(axis=0)
                    block = row[low + step : high + step]
                    np.minimum(block, sums, out=block)
            if len(self.problem.num_devices) > 1:
                row[~self.valid] = math.inf
            first, last = intervals(np.isfinite(row))
            if first < last:
                lowest[k], highest[k] = int(first), int(last)
        return bound


def intervals(kept: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """Along the last axis, the first place that is kept and the one after the last; 0, 0 where
    there is none."""
    stop = kept.shape[-1] - kept[..., ::-1].argmax(axis=-1)
    return kept.argmax(axis=-1), np.where(kept.any(axis=-1), stop, 0)


def _states(
    problem: InterOpProblem, sizes: list[tuple[int, int]]
) -> tuple[IntArray, int, NDArray[np.bool_]]:
    """steps, all_used and valid of the tables."""
    counts, radices = list[int](), list[int]()
    stride, all_used = 1, 0
    strides = [0] * len(problem.num_devices)
    units = [1] * len(problem.num_devices)
    for group, devices in reversed(list(enumerate(problem.num_devices))):
        own = [n for g, n in sizes if g == group]
        units[group] = math.gcd(*own) if own else devices + 1
        if devices % units[group]:
            return np.ones(len(sizes), dtype=np.intp), -1, np.empty(0, dtype=bool)
        count = devices // units[group]
        radix = count + 1 + max(own) // units[group]
        strides[group] = stride
        all_used += count * stride
        stride *= radix
        counts.insert(0, count)
        radices.insert(0, radix)
    steps = np.array([n // units[g] * strides[g] for g, n in sizes], dtype=np.intp)
    digits = np.unravel_index(np.arange(all_used + 1), radices)
    valid = np.all([d <= n for d, n in zip(digits, counts, strict=True)], axis=0)
    return steps, all_used, valid
