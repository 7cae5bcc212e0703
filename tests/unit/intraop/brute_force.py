"""The oracle: all assignments of a small program at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.intraop.problem import FloatArray, IntraOpProblem


@dataclass(frozen=True, slots=True)
class BruteForce:
    """seconds and bytes of every assignment, one tensor dimension per node."""

    seconds: FloatArray
    bytes: FloatArray

    def optimum(self, budget_bytes: float | None) -> float:
        """The least seconds within the budget; inf when nothing fits."""
        if budget_bytes is None:
            return float(self.seconds.min())
        fits = self.bytes <= budget_bytes
        return float(self.seconds[fits].min()) if fits.any() else np.inf

    def least_bytes(self) -> float:
        return float(self.bytes[np.isfinite(self.seconds)].min())


def brute_force(problem: IntraOpProblem) -> BruteForce:
    """O(product of strategies): at most about 1e6 assignments."""
    sizes = [len(c_v) for c_v in problem.node_seconds]
    seconds, num_bytes = np.zeros(sizes), np.zeros(sizes)
    for v, (c_v, m_v) in enumerate(zip(problem.node_seconds, problem.node_bytes, strict=True)):
        shape = [n if w == v else 1 for w, n in enumerate(sizes)]
        seconds = seconds + c_v.reshape(shape)
        num_bytes = num_bytes + m_v.reshape(shape)
    for (u, v), r_uv in zip(problem.edges, problem.edge_seconds, strict=True):
        seconds = seconds + r_uv.reshape([n if w in (u, v) else 1 for w, n in enumerate(sizes)])
    return BruteForce(seconds, num_bytes)
