"""The intra-op program as data: which strategy each node takes, under a byte budget.

    min   sum_v c_v . x_v  +  sum_(u,v) x_u' R_uv x_v        x_v one-hot over the strategies of v
    s.t.  sum_v m_v . x_v  <=  budget_bytes

(Alpa, OSDI'22, eq. 1, with memory as a sum.) Seconds and bytes; infinity marks a forbidden
strategy or pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from math import fsum
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from autopar.errors import OptionError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

BYTES_TOLERANCE = 1e-9
"""A plan fits when its bytes are at most budget * (1 + this): what row scaling in a MIP can
resolve.
"""


@dataclass(frozen=True, slots=True, eq=False)
class IntraOpProblem:
    """min sum_v c_v.x_v + sum_(u,v) x_u' R_uv x_v   s.t.  sum_v m_v.x_v <= budget_bytes ; x_v
    one-hot

    node_seconds  c_v  float64 [n_v], may hold inf = forbidden strategy
    node_bytes    m_v  float64 [n_v] >= 0
    edges         u < v, each pair once; edge_seconds R_uv float64 [n_u, n_v], inf = forbidden pair.
    Many edges may (and should) share one array object: solvers work once per object. Never write
    into it.
    node_layers   of each node, rising with the depth of the model; () where they are not known
    """

    node_names: tuple[str, ...]
    node_seconds: tuple[FloatArray, ...]
    node_bytes: tuple[FloatArray, ...]
    edges: tuple[tuple[int, int], ...]
    edge_seconds: tuple[FloatArray, ...]
    budget_bytes: float | None = None
    node_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_nodes()
        self._check_edges()
        self._check_budget()

    def _check_budget(self) -> None:
        if self.budget_bytes is not None and not self.budget_bytes >= 0:
            raise OptionError(f"budget_bytes must be >= 0 or None, got {self.budget_bytes}")

    def _check_nodes(self) -> None:
        n = len(self.node_names)
        if not n == len(self.node_seconds) == len(self.node_bytes):
            raise OptionError(
                f"one cost and one byte vector per node: got {n} names, "
                f"{len(self.node_seconds)} costs, {len(self.node_bytes)} byte vectors"
            )
        for name, c_v, m_v in zip(self.node_names, self.node_seconds, self.node_bytes, strict=True):
            if c_v.dtype != np.float64 or m_v.dtype != np.float64:
                raise OptionError(f"node {name}: float64 wanted, got {c_v.dtype}, {m_v.dtype}")
            if c_v.ndim != 1 or c_v.size == 0 or c_v.shape != m_v.shape:
                raise OptionError(f"node {name}: seconds {c_v.shape} and bytes {m_v.shape} differ")
        if self._values_are_sound():
            return
        for name, c_v, m_v in zip(self.node_names, self.node_seconds, self.node_bytes, strict=True):
            if not (np.isfinite(m_v).all() and (m_v >= 0).all()):
                raise OptionError(f"node {name}: bytes must be finite and >= 0, got {m_v}")
            if np.isnan(c_v).any() or np.isneginf(c_v).any() or not np.isfinite(c_v).any():
                raise OptionError(
                    f"node {name}: needs a finite strategy and no nan or -inf, got {c_v}"
                )

    def _values_are_sound(self) -> bool:
        """Of all nodes at once; a comparison with nan is False."""
        if not self.node_seconds:
            return True
        seconds, nbytes = np.concatenate(self.node_seconds), np.concatenate(self.node_bytes)
        first = np.cumsum([0, *(c_v.size for c_v in self.node_seconds[:-1])])
        allowed = np.minimum.reduceat(seconds, first) < np.inf
        sound = (nbytes >= 0).all() and (nbytes < np.inf).all() and (seconds > -np.inf).all()
        return bool(sound and allowed.all())

    def _check_edges(self) -> None:
        if len(self.edges) != len(self.edge_seconds):
            raise OptionError(f"{len(self.edges)} edges but {len(self.edge_seconds)} matrices")
        if len(set(self.edges)) != len(self.edges):
            raise OptionError("an edge appears twice: add its matrices up and give it once")
        n = len(self.node_names)
        seen: set[int] = set()
        for (u, v), r_uv in zip(self.edges, self.edge_seconds, strict=True):
            if not 0 <= u < v < n:
                raise OptionError(f"edge ({u}, {v}) needs 0 <= u < v < {n}")
            want = (self.node_seconds[u].size, self.node_seconds[v].size)
            if r_uv.shape != want:
                raise OptionError(f"edge ({u}, {v}): matrix {r_uv.shape}, strategies {want}")
            if id(r_uv) in seen:
                continue
            seen.add(id(r_uv))
            if r_uv.dtype != np.float64 or not (r_uv > -np.inf).all():
                raise OptionError(f"edge ({u}, {v}): float64 without nan or -inf wanted")

    def seconds(self, choice: tuple[int, ...]) -> float:
        """The objective of one assignment, inf where it uses something forbidden."""
        nodes = fsum(c_v.item(s) for c_v, s in zip(self.node_seconds, choice, strict=True))
        pairs = zip(self.edges, self.edge_seconds, strict=True)
        return nodes + fsum(r_uv.item(choice[u], choice[v]) for (u, v), r_uv in pairs)

    def bytes(self, choice: tuple[int, ...]) -> float:
        """The left side of the budget row."""
        return fsum(m_v.item(s) for m_v, s in zip(self.node_bytes, choice, strict=True))

    def fits(self, num_bytes: float) -> bool:
        """Whether so many bytes are within the budget, up to BYTES_TOLERANCE."""
        return self.budget_bytes is None or num_bytes <= self.budget_bytes * (1 + BYTES_TOLERANCE)

    def with_budget(self, budget_bytes: float | None) -> IntraOpProblem:
        """The same program under another budget; arrays are shared, and sound as they were."""
        other = copy(self)
        object.__setattr__(other, "budget_bytes", budget_bytes)
        other._check_budget()
        return other


@dataclass(frozen=True, slots=True)
class IntraOpSolution:
    """One assignment and what is proven about it.

    bound: no assignment within the budget takes fewer seconds. optimal: seconds = bound up to 1e-6
    relative. stats: what the solver did (sweeps, multipliers, fallback, ...), for reports.
    """

    choice: tuple[int, ...]
    seconds: float
    bytes: float
    bound: float
    optimal: bool
    solver: str
    wall_s: float
    stats: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def gap(self) -> float:
        """(seconds - bound) / |bound|: the seconds that may still be had, as a share."""
        return relative_gap(self.seconds, self.bound)


def relative_gap(seconds: float, bound: float) -> float:
    """(seconds - bound) / |bound|, 0 where both are equal."""
    return max(0.0, seconds - bound) / max(abs(bound), np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class LeastBytes:
    """The least bytes of any assignment without forbidden parts. exact=False: only a lower
    bound.
    """

    bytes: float
    exact: bool


def least_bytes(problem: IntraOpProblem) -> LeastBytes:
    """Sum over nodes of the least bytes of an allowed strategy. O(strategies).

    Exact unless the edges among the lightest strategies hold a forbidden pair; then a lower bound.
    """
    choice = lightest_choice(problem)
    exact = bool(np.isfinite(problem.seconds(choice)))
    return LeastBytes(bytes=problem.bytes(choice), exact=exact)


def lightest_choice(problem: IntraOpProblem) -> tuple[int, ...]:
    """Per node alone the allowed strategy of least bytes; ties by seconds, then index."""
    pairs = zip(problem.node_seconds, problem.node_bytes, strict=True)
    return tuple(
        int(np.lexsort((c_v, np.where(np.isinf(c_v), np.inf, m_v)))[0]) for c_v, m_v in pairs
    )
