"""Cost tables of the inter-op program, grouped for the dynamic program, and a bound from them.

Of the submesh choices with equal devices only the cheapest matters, for the sum and for the
maximum, so choices become groups g; devices are counted in units of their common divisor. The bound
forgets the stage count and takes the cheapest in-flight row:
   G(0, 0; t) = 0
   G(k, d; t) = min over j < k, group g with c <= t of  c + G(j, d - D_g; t)     c = min over f cost
so G(k, d; t) <= the sum of any stages that hold layers 0..k-1 on d devices, none above t.
Complexity: tables O(F K^2 M), the bound O(K^2 D M) in O(K M) numpy calls. Seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autopar.interop.problem import FloatArray, InterOpProblem


@dataclass(frozen=True, slots=True, eq=False)
class CostTables:
    """Costs by number of layers, so that one diagonal of the cut is one contiguous row.

    cost[f][g, n-1, k]: least c of n layers from k on a submesh of unit_counts[g] units of devices.
    """

    problem: InterOpProblem
    units: int  # D in units; -1 where D is no multiple of the unit
    unit_counts: tuple[int, ...]
    cost: dict[int, FloatArray]
    least: FloatArray  # [g, n-1, k]: min over f of cost[f]
    candidates: FloatArray  # sorted, distinct, finite: what max_i t_i can be
    fill: FloatArray  # (B - 1) t of each candidate t

    @classmethod
    def of(cls, problem: InterOpProblem) -> CostTables:
        unit = math.gcd(*problem.submesh_devices)
        devices = np.array(problem.submesh_devices)
        counts = sorted(set(problem.submesh_devices))
        length, first = np.indices((problem.num_layers, problem.num_layers))
        last = np.minimum(first + length, problem.num_layers - 1)
        cost: dict[int, FloatArray] = {}
        for f in sorted(set(problem.in_flight[: problem.stage_limit])):
            c_nkm = problem.stage_seconds[f - 1, first, last] + problem.transfer_seconds[first]
            c_nkm[first + length >= problem.num_layers] = math.inf
            cost[f] = np.stack([c_nkm[:, :, devices == n].min(axis=2) for n in counts])
        values = np.unique(np.concatenate([np.empty(0), *map(np.ravel, cost.values())]))
        candidates = values[np.isfinite(values)]
        return cls(
            problem=problem,
            units=-1 if problem.num_devices % unit else problem.num_devices // unit,
            unit_counts=tuple(n // unit for n in counts),
            cost=cost,
            least=np.min([np.full((len(counts), *first.shape), math.inf), *cost.values()], axis=0),
            candidates=candidates,
            fill=(problem.num_microbatches - 1) * candidates,
        )

    def index(self, t_max: float) -> int:
        """The place of a stage's seconds among the candidates."""
        return int(np.searchsorted(self.candidates, t_max))

    def prefix_bound(self, t_max: float) -> FloatArray:
        """G(k, d; t_max) as an array [K+1, units+1]: never above the true least sum of a prefix."""
        layers, units = self.problem.num_layers, max(self.units, 0)
        bound = np.full((layers + 1, units + 1), math.inf)
        bound[0, 0] = 0.0
        shifted = np.full((len(self.unit_counts), layers, units + 1), math.inf)
        for k in range(1, layers + 1):
            for g, count in enumerate(self.unit_counts):
                shifted[g, k - 1, count:] = bound[k - 1, : max(units + 1 - count, 0)]
            first = np.arange(k)
            c_gj = self.least[:, k - 1 - first, first]
            c_gj = np.where(c_gj <= t_max, c_gj, math.inf)
            useful = np.flatnonzero(np.isfinite(c_gj).any(axis=0))
            if useful.size:
                near = slice(useful[0], useful[-1] + 1)
                bound[k] = (c_gj[:, near, None] + shifted[:, near]).min(axis=(0, 1))
        return bound
