"""What stages cost on each mesh view, found out only as far as the search needs it.

For one number of microbatches B and one view the frontiers of the layer classes are known to some
level, each a lower bound of the next:

    SCALED   from other numbers of microbatches: seconds per row fall with the rows of a microbatch,
             and the least of affine functions is concave, so that the chord between two known
             numbers, or proportion to the next smaller one, is never above the truth
    FREE     the fastest solution of each layer, whatever its bytes
    FULL     solutions from fast to small under every recompute policy allowed

A stage that fits at FREE is exact; one that does not is priced by its free seconds until its view
is at FULL. Where even the least bytes of its layers do not fit, it is impossible, and no frontier
is needed to say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from autopar.errors import OptionError
from autopar.estimate import MeshCosts
from autopar.intraop.build import StageContext, build_problem
from autopar.intraop.compose import (
    PRICES,
    Frontier,
    Point,
    layer_points,
    stage_seconds,
    undominated,
)
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from autopar.search.clock import Clock
from autopar.search.program import Program

FloatArray = NDArray[np.float64]

_REFUSED_S = 1e18  # of a layer that a pin keeps from a view: finite, as a stage may have none of it


class Level(IntEnum):
    SCALED = 0
    FREE = 1
    FULL = 2


@dataclass(frozen=True, slots=True)
class LeastBytes:
    """Of one layer: no solution under any policy has fewer. saved: per microbatch in flight."""

    standing: float
    saved: float


@dataclass(slots=True)
class _View:
    """What is known about one view, by number of microbatches."""

    free: dict[int, tuple[Frontier, ...]] = field(default_factory=dict)
    full: dict[int, tuple[Frontier, ...]] = field(default_factory=dict)
    least: tuple[int, tuple[LeastBytes, ...]] | None = None  # number of microbatches, per class


class Prices:
    """The tables of one search. program: by number of microbatches, made when asked for."""

    def __init__(
        self,
        program: Callable[[int], Program],
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        policies: Sequence[Remat],
        clock: Clock,
    ) -> None:
        self._program, self._mesh_costs = program, mesh_costs
        self._policies, self._clock = tuple(policies), clock
        self._views: dict[LogicalMesh, _View] = {}
        self.num_solves = 0
        self.refused: OptionError | None = None  # a pin that some view cannot honour

    def level(self, view: LogicalMesh, count: int) -> Level:
        known = self._views.get(view)
        if known is None:
            return Level.SCALED
        if count in known.full:
            return Level.FULL
        return Level.FREE if count in known.free else Level.SCALED

    def state(self, view: LogicalMesh, count: int) -> tuple[int, int, bool]:
        """Changes whenever what is known about the view at this number of microbatches does."""
        known = self._views.get(view)
        if known is None:
            return Level.SCALED, 0, False
        return self.level(view, count), len(known.free), known.least is not None

    def raise_level(self, view: LogicalMesh, count: int, smallest: int, largest: int) -> None:
        """One level up. smallest, largest: numbers of microbatches that anchor the scaled ones."""
        known = self._views.setdefault(view, _View())
        if count in known.free:
            if known.least is None:
                known.least = count, self._least(view, count)
            else:
                known.full[count] = self._full(view, count)
            return
        for anchor in (smallest, largest):
            if anchor not in known.free:
                known.free[anchor] = self._free(view, anchor)
                return
        known.free[count] = self._free(view, count)

    def frontiers(self, view: LogicalMesh, count: int) -> tuple[Frontier, ...]:
        """Of each class, at the level reached."""
        known = self._views[view]
        if count in known.full:
            return known.full[count]
        return known.free[count] if count in known.free else _scaled(known.free, count)

    def least_bytes(self, view: LogicalMesh, count: int) -> tuple[LeastBytes, ...] | None:
        """Of each class, where it was asked for."""
        known = self._views.get(view)
        if known is None or known.least is None:
            return None
        anchor, least = known.least
        return tuple(LeastBytes(b.standing, b.saved * anchor / count) for b in least)

    def stage_seconds(
        self,
        view: LogicalMesh,
        count: int,
        counts: NDArray[np.int64],
        in_flight: int,
        budget_bytes: float,
    ) -> tuple[FloatArray, NDArray[np.bool_]]:
        """([U] seconds, [U] whether they are exact) of the stages with so many layers of each
        class; otherwise the seconds are a lower bound."""
        known = self._views.get(view)
        if known is None:
            return np.zeros(counts.shape[0]), np.zeros(counts.shape[0], dtype=bool)
        level, frontiers = self.level(view, count), self.frontiers(view, count)
        seconds = stage_seconds(frontiers, counts, in_flight, budget_bytes)
        seconds = np.where(seconds >= _REFUSED_S, np.inf, seconds)
        if level is Level.FULL:
            return seconds, np.ones(counts.shape[0], dtype=bool)
        exact = np.isfinite(seconds) & (level is Level.FREE)
        if not exact.all():
            free = stage_seconds(frontiers, counts, in_flight, math.inf)
            free = np.where(free >= _REFUSED_S, np.inf, free)
            seconds = np.where(exact, seconds, free)
        least = self.least_bytes(view, count)
        if least is not None:
            need = counts @ np.array([b.standing + in_flight * b.saved for b in least])
            impossible = need > budget_bytes
            seconds = np.where(impossible, np.inf, seconds)
            exact = exact | impossible
        return seconds, exact

    # ---- solving

    def _free(self, view: LogicalMesh, count: int) -> tuple[Frontier, ...]:
        return self._solve(view, count, Remat.NONE if Remat.NONE in self._policies else None)

    def _solve(
        self, view: LogicalMesh, count: int, remat: Remat | None, **settings: Sequence[float]
    ) -> tuple[Frontier, ...]:
        policy = self._policies[0] if remat is None else remat
        program, costs = self._program(count), self._mesh_costs(view)
        found = []
        for kind, stage in zip(program.classes, program.prepared(policy), strict=True):
            context = StageContext(count, owned=kind.owned, pins=program.pins)
            self.num_solves += 1
            try:
                points = layer_points(
                    stage.graph,
                    stage.table,
                    costs,
                    context,
                    remat=policy,
                    deadline=self._clock.deadline,
                    **({"prices": (0.0,)} | settings),
                )
            except OptionError as error:  # a pin that this view cannot honour
                self.refused = error
                points = (Point(_REFUSED_S, 0.0, 0.0, 0.0, policy),)
            found.append(points)
        return tuple(found)

    def _full(self, view: LogicalMesh, count: int) -> tuple[Frontier, ...]:
        per_policy = [self._solve(view, count, p, prices=PRICES) for p in self._policies]
        return tuple(
            undominated(point for frontier in frontiers for point in frontier)
            for frontiers in zip(*per_policy, strict=True)
        )

    def _least(self, view: LogicalMesh, count: int) -> tuple[LeastBytes, ...]:
        program, costs = self._program(count), self._mesh_costs(view)
        found = []
        for number, kind in enumerate(program.classes):
            least = LeastBytes(math.inf, math.inf)
            for policy in self._policies:
                stage = program.prepared(policy)[number]
                context = StageContext(count, owned=kind.owned, pins=program.pins)
                built = build_problem(stage.graph, stage.table, costs, context)
                nbytes = dict.fromkeys(("parameter", "gradient", "saved", ""), 0.0)
                for name, sizes in zip(built.byte_kinds, built.problem.node_bytes, strict=True):
                    nbytes[name] += float(sizes.min())
                standing = nbytes["parameter"] + nbytes["gradient"]
                least = LeastBytes(min(least.standing, standing), min(least.saved, nbytes["saved"]))
            found.append(least)
        return tuple(found)


def _scaled(free: dict[int, tuple[Frontier, ...]], count: int) -> tuple[Frontier, ...]:
    """A lower bound for a number of microbatches between or above the known ones."""
    below = max(known for known in free if known <= count)
    above = min((known for known in free if known > count), default=None)
    if above is None:
        return tuple(tuple(p.scaled(below / count) for p in f) for f in free[below])
    weight = (1 / count - 1 / above) / (1 / below - 1 / above)  # of the larger microbatch
    return tuple(
        (_between(fast[0], slow[0], weight),)
        for fast, slow in zip(free[below], free[above], strict=True)
    )


def _between(large: Point, small: Point, weight: float) -> Point:
    """The chord between the points of a large and a small microbatch."""

    def mix(a: float, b: float) -> float:
        return weight * a + (1 - weight) * b

    return Point(
        mix(large.seconds, small.seconds),
        mix(large.standing_bytes, small.standing_bytes),
        mix(large.saved_bytes, small.saved_bytes),
        mix(large.transient_bytes, small.transient_bytes),
        large.remat,
    )
