"""What stages cost on each mesh view, found out only as far as the search needs it.

For one number of microbatches B and one view the frontiers of the layer classes are known to some
level, each a lower bound of the next:

    SCALED   from other numbers of microbatches: seconds per row fall with the rows of a microbatch,
             and the least of affine functions is concave, so that the chord between two known
             numbers, or proportion to the next smaller one, is never above the truth
    FREE     the fastest solution of each layer, whatever its bytes
    FULL     solutions from fast to small under every recompute policy allowed

A stage that fits at FREE is exact. One that does not is priced, until its view is at FULL, by the
mixture of optimistic points: of each policy its fastest seconds, and the fewest bytes that any of
its solutions has, both in proportion to the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

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


class StagePrices(NamedTuple):
    """Of stages, by number: seconds, whether they are exact and not a lower bound, and whether the
    fastest solutions fit."""

    seconds: FloatArray
    exact: NDArray[np.bool_]
    fits: NDArray[np.bool_]


@dataclass(slots=True)
class _View:
    """What is known about one view, by number of microbatches. optimistic: at the smallest."""

    free: dict[int, tuple[Frontier, ...]] = field(default_factory=dict)
    full: dict[int, tuple[Frontier, ...]] = field(default_factory=dict)
    optimistic: tuple[int, tuple[Frontier, ...]] | None = None


class Prices:
    """The tables of one search. program: by number of microbatches, made when asked for."""

    def __init__(
        self,
        program: Callable[[int], Program],
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        policies: Sequence[Remat],
        clock: Clock,
        *,
        offload: bool = False,
    ) -> None:
        self._program, self._mesh_costs, self._offload = program, mesh_costs, offload
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
        return self.level(view, count), len(known.free), known.optimistic is not None

    def raise_level(
        self, view: LogicalMesh, count: int, smallest: int, largest: int, *, fits: bool
    ) -> None:
        """One level up. smallest, largest: numbers of microbatches that anchor the scaled ones.
        fits: whether the stage that asks fits with its fastest solutions."""
        known = self._views.setdefault(view, _View())
        if smallest not in known.free:
            known.free[smallest] = self._free(view, smallest)
        elif not fits and known.optimistic is None:
            known.optimistic = smallest, self._optimistic(view, smallest, known.free[smallest])
        elif count in known.free:
            known.full[count] = self._full(view, count)
        elif largest not in known.free:
            known.free[largest] = self._free(view, largest)
        else:
            known.free[count] = self._free(view, count)

    def frontiers(self, view: LogicalMesh, count: int) -> tuple[Frontier, ...]:
        """Of each class, at the level reached."""
        known = self._views[view]
        if count in known.full:
            return known.full[count]
        return known.free[count] if count in known.free else _scaled(known.free, count)

    def optimistic(self, view: LogicalMesh, count: int) -> tuple[Frontier, ...] | None:
        """Of each class, where it was asked for: no mixture of real points is better."""
        known = self._views.get(view)
        if known is None or known.optimistic is None:
            return None
        anchor, points = known.optimistic
        return tuple(tuple(p.scaled(anchor / count) for p in frontier) for frontier in points)

    def stage_seconds(
        self,
        view: LogicalMesh,
        count: int,
        counts: NDArray[np.int64],
        in_flight: int,
        budget_bytes: float,
    ) -> StagePrices:
        """Of the stages with so many layers of each class, counts[U, classes]."""
        nothing = np.zeros(counts.shape[0], dtype=bool)
        if view not in self._views:
            return StagePrices(np.zeros(counts.shape[0]), nothing, nothing)
        level, frontiers = self.level(view, count), self.frontiers(view, count)
        seconds = _refused(stage_seconds(frontiers, counts, in_flight, budget_bytes))
        fits = np.isfinite(seconds)
        if level is Level.FULL:
            return StagePrices(seconds, ~nothing, fits)
        free = _refused(stage_seconds(frontiers, counts, in_flight, math.inf))
        least = self.optimistic(view, count)
        if least is not None:
            tight = stage_seconds(least, counts, in_flight, budget_bytes)
            seconds = np.where(fits, seconds, np.maximum(free, _refused(tight)))
        else:
            seconds = np.where(fits, seconds, free)
        exact = np.isinf(seconds) | (fits if level is Level.FREE else nothing)
        return StagePrices(seconds, exact, fits)

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
            context = StageContext(
                count, owned=kind.owned, pins=program.pins, offload=self._offload
            )
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

    def _optimistic(
        self, view: LogicalMesh, count: int, free: tuple[Frontier, ...]
    ) -> tuple[Frontier, ...]:
        """One point per policy: its fastest seconds, and the fewest bytes of each kind."""
        program, costs = self._program(count), self._mesh_costs(view)
        points: list[list[Point]] = [[] for _ in program.classes]
        for policy in self._policies:
            first = policy is self._policies[0]
            fastest = free if first else self._solve(view, count, policy)
            for number, kind in enumerate(program.classes):
                stage = program.prepared(policy)[number]
                context = StageContext(count, owned=kind.owned, offload=self._offload)
                built = build_problem(stage.graph, stage.table, costs, context)
                nbytes = dict.fromkeys(("parameter", "gradient", "saved", ""), 0.0)
                for name, sizes in zip(built.byte_kinds, built.problem.node_bytes, strict=True):
                    nbytes[name] += float(sizes.min())
                standing = nbytes["parameter"] + nbytes["gradient"]
                seconds = fastest[number][0].seconds
                points[number].append(Point(seconds, standing, nbytes["saved"], 0.0, policy))
        return tuple(undominated(frontier) for frontier in points)


def _refused(seconds: FloatArray) -> FloatArray:
    """inf where a layer is refused."""
    return np.where(seconds >= _REFUSED_S, np.inf, seconds)


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
