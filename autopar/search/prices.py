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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.errors import OptionError
from autopar.estimate import MeshCosts
from autopar.intraop.compose import (
    PRICES,
    Frontier,
    Point,
    StageParts,
    layer_points,
    stage_parts,
    stage_seconds,
    undominated,
)
from autopar.intraop.stage_problem import StageContext
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from autopar.search.clock import Clock
from autopar.search.pool import each
from autopar.search.program import Program

FloatArray = NDArray[np.float64]

_ROUNDING = 1 + 1e-9
_WORTH_A_FORK = 600  # operators
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


class SplitFlight(NamedTuple):
    """Microbatches that a stage holds at most where backward is split: those whose B has not ended,
    and those whose W has not."""

    begun: int
    waiting: int

    @classmethod
    def zb_h1(cls, stage: int, num_stages: int, num_microbatches: int) -> SplitFlight:
        """While a W is played: what waits for it is seldom less than what is saved."""
        waiting = min(stage + 1, num_microbatches)
        return cls(min(num_stages - stage - 1, num_microbatches - waiting), waiting)

    def fits(self, parts: StageParts, budget_bytes: float) -> bool:
        held = self.begun * parts.saved_bytes + self.waiting * parts.held_bytes
        return parts.rest_bytes + held <= budget_bytes * _ROUNDING


@dataclass(frozen=True, slots=True)
class _Step:
    """What takes a view one level up. Level.SCALED stands for its optimistic points."""

    view: LogicalMesh
    count: int
    level: Level
    policies: tuple[Remat, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """A step under one policy, of one class of layers. size: operators."""

    view: LogicalMesh
    count: int
    level: Level
    policy: Remat
    kind: int
    size: int


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
        alone: bool = False,
    ) -> None:
        """alone: of layers as they are without neighbours, which bounds stages (`layer_points`)."""
        self._alone = alone
        self._program, self._mesh_costs, self._offload = program, mesh_costs, offload
        self._policies, self._clock = tuple(policies), clock
        self._views: dict[LogicalMesh, _View] = {}
        self.refused: OptionError | None = None  # a pin that some view cannot honour

    def level(self, view: LogicalMesh, count: int) -> Level:
        known = self._views.get(view)
        if known is None:
            return Level.SCALED
        if count in known.full:
            return Level.FULL
        return Level.FREE if count in known.free else Level.SCALED

    def known(self, view: LogicalMesh, count: int) -> bool:
        """Whether anything is: what is known of fewer microbatches tells of more."""
        known = self._views.get(view)
        return known is not None and any(c <= count for c in known.free)

    def state(self, view: LogicalMesh, count: int) -> tuple[int, int, bool]:
        """Changes whenever what is known about the view at this number of microbatches does."""
        known = self._views.get(view)
        if known is None or not self.known(view, count):
            return Level.SCALED, 0, False
        return self.level(view, count), len(known.free), known.optimistic is not None

    def raise_levels(
        self, views: Mapping[LogicalMesh, bool], count: int, smallest: int, largest: int
    ) -> None:
        """Each view one level up, several at a time. views: with whether the stage that asks fits
        with its fastest solutions. smallest, largest: numbers of microbatches that anchor the
        scaled ones."""
        steps = [self._next(view, count, smallest, largest, fits) for view, fits in views.items()]
        jobs = [job for step in steps for job in self._jobs(step)]
        worth = sum(job.size for job in jobs) >= _WORTH_A_FORK
        answers = each(self._run, jobs, None if worth else 1, [job.size for job in jobs])
        points = iter(answers)
        for step in steps:
            kinds = range(len(self._program(step.count).classes))
            per_policy = [[next(points) for _ in kinds] for _ in step.policies]
            refused = (r for found in per_policy for _, r in found if r is not None)
            self.refused = next(refused, self.refused)
            self._keep(step, [tuple(frontier for frontier, _ in found) for found in per_policy])

    def _jobs(self, step: _Step) -> list[_Job]:
        """By policy, then by class. What all forks share is made here."""
        program = self._program(step.count)
        self._mesh_costs(step.view)
        return [
            _Job(step.view, step.count, step.level, policy, kind, len(stage.graph.operators))
            for policy in step.policies
            for kind, stage in enumerate(program.prepared(policy))
        ]

    def _next(
        self, view: LogicalMesh, count: int, smallest: int, largest: int, fits: bool
    ) -> _Step:
        known = self._views.get(view, _View())
        first = self._policies if self._alone else self._policies[:1]
        if smallest not in known.free:
            return _Step(view, smallest, Level.FREE, first)
        if not fits and known.optimistic is None:
            return _Step(view, smallest, Level.SCALED, self._policies)
        if count in known.free:
            return _Step(view, count, Level.FULL, self._policies)
        return _Step(view, count if largest in known.free else largest, Level.FREE, first)

    def _keep(self, step: _Step, per_policy: Sequence[tuple[Frontier, ...]]) -> None:
        merged = tuple(
            undominated(point for frontier in frontiers for point in frontier)
            for frontiers in zip(*per_policy, strict=True)
        )
        known = self._views.setdefault(step.view, _View())
        if step.level is Level.FREE:
            known.free[step.count] = merged
        elif step.level is Level.FULL:
            known.full[step.count] = merged
        else:
            known.optimistic = step.count, merged

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
        counts: NDArray[np.int64] | FloatArray,
        in_flight: int,
        budget_bytes: float,
    ) -> StagePrices:
        """Of the stages with so many layers of each class, counts[U, classes]."""
        nothing = np.zeros(counts.shape[0], dtype=bool)
        if not self.known(view, count):
            return StagePrices(np.zeros(counts.shape[0]), nothing, nothing)
        level, frontiers = self.level(view, count), self.frontiers(view, count)
        seconds = _refused(stage_seconds(frontiers, counts, in_flight, budget_bytes))
        fits = np.isfinite(seconds)
        if level is Level.FULL:
            return StagePrices(seconds, ~nothing, fits)
        least = self.least_seconds(view, count, counts, in_flight, budget_bytes)
        seconds = np.where(fits, seconds, least)
        exact = np.isinf(seconds) | (fits if level is Level.FREE else nothing)
        return StagePrices(seconds, exact, fits)

    def stage_parts(
        self,
        view: LogicalMesh,
        count: int,
        counts: NDArray[np.int64] | FloatArray,
        in_flight: int,
        budget_bytes: float,
    ) -> StageParts:
        """Of one stage, counts[classes]; nothing where nothing is known."""
        if not self.known(view, count):
            return StageParts(0.0, 0.0, 0.0, 0.0)
        return stage_parts(self.frontiers(view, count), counts, in_flight, budget_bytes)

    def least_seconds(
        self,
        view: LogicalMesh,
        count: int,
        counts: NDArray[np.int64] | FloatArray,
        in_flight: int,
        budget_bytes: float,
    ) -> FloatArray:
        """Of the same stages, whatever points are known: no less than their layers take alone, or
        than a mixture of optimistic points that fits."""
        if not self.known(view, count):
            return np.zeros(counts.shape[0])
        known = self._views[view]
        points = known.free[count] if count in known.free else _scaled(known.free, count)
        free = _refused(stage_seconds(points, counts, in_flight, math.inf))
        least = self.optimistic(view, count)
        if least is None:
            return free
        tight = _refused(stage_seconds(least, counts, in_flight, budget_bytes))
        return np.maximum(free, tight)

    # ---- solving

    def _run(self, job: _Job) -> tuple[Frontier, OptionError | None]:
        """The points of a class, and a pin that the view cannot honour."""
        program, costs = self._program(job.count), self._mesh_costs(job.view)
        owned, stage = program.classes[job.kind].owned, program.prepared(job.policy)[job.kind]
        context = StageContext(
            job.count,
            owned=owned,
            pins=program.pins,
            offload=self._offload,
            compiled=program.compiled,
        )
        try:
            points = layer_points(
                stage.graph,
                stage.table,
                costs,
                context,
                remat=job.policy,
                prices=PRICES if job.level is Level.FULL else PRICES[:1],
                deadline=self._clock.deadline,
                alone=self._alone,
                optimistic=job.level is Level.SCALED,
            )
        except OptionError as error:
            return (Point(_REFUSED_S, 0.0, 0.0, 0.0, job.policy),), error
        return points, None


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
        mix(large.once_s, small.once_s),
        mix(large.held_bytes, small.held_bytes),
    )
