"""Stage cuts in order of promise: the inter-op program over tables that are exact only where it
looks.

    until the best cut's stages are all exact:  solve the inter-op program, raise the level of the
                                                views on its path

Tables are lower bounds, so that the first cut whose stages are exact is the best of all; of the
others only what a path touched was ever priced. One such search runs for each number of
microbatches and number of stages, the most promising first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.candidate import Cut
from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts
from autopar.interop import dp
from autopar.interop.problem import InterOpProblem, InterOpSolution, StageChoice
from autopar.mesh import LogicalMesh, Submesh
from autopar.schedule import in_flight_count
from autopar.search.clock import Clock
from autopar.search.prices import Prices, StagePrices
from autopar.search.program import Program
from autopar.search.space import Space

FloatArray = NDArray[np.float64]

_VIEWS = 2  # of a stage's submesh that are solved exactly
_WORTH_SOLVING = 1.06  # a view whose table value is this much above the best is not
_WORTH_PRICING = 0.995  # of the best exact cut: what cannot be faster than that is not priced
_COUNT_MARGIN = 1.25  # a number of stages this much worse than the best one is not followed


@dataclass(order=True, slots=True)
class _Item:
    """A number of microbatches, and a number of stages (0: all of them), by its least step."""

    seconds: float
    num_microbatches: int
    num_stages: int
    found: InterOpSolution | None = field(default=None, compare=False)
    version: int = field(default=0, compare=False)  # of the tables in which it was found


class _Tables:
    """Stage costs at one number of microbatches: per in-flight row and distinct stage, the best
    view of each submesh."""

    def __init__(self, search: CutSearch, count: int) -> None:
        space = search.space
        limit = search.stage_limit
        self.count = count
        self.flights = [in_flight_count(space.schedules[0], s + 1, count) for s in range(limit)]
        self.rows = sorted(set(self.flights))
        self._search = search
        self._levels: dict[LogicalMesh, tuple[int, int, bool]] = {}
        self._parts: dict[LogicalMesh, StagePrices] = {}
        self.problem: InterOpProblem | None = None
        self.version = 0

    def refresh(self) -> InterOpProblem:
        """The inter-op program at the levels that the views have reached by now."""
        search, space = self._search, self._search.space
        changed = self.problem is None
        for submesh in space.submeshes:
            for view in space.views[submesh]:
                state = search.prices.state(view, self.count)
                if self._levels.get(view) != state:
                    self._levels[view] = state
                    self._parts[view] = self._priced(view)
                    changed = True
        if not changed:
            assert self.problem is not None
            return self.problem
        self.version += 1
        seconds = [
            np.min([self._parts[v][0] for v in space.views[s]], axis=0) for s in space.submeshes
        ]
        layers = search.num_layers
        table = np.full((len(self.rows), layers, layers, len(space.submeshes)), math.inf)
        first, last = np.triu_indices(layers)
        table[:, first, last] = np.stack(seconds, axis=-1)[:, search.index[first, last]]
        self.problem = InterOpProblem(
            num_layers=layers,
            num_devices=tuple(group.num_devices for group in space.cluster.groups),
            submesh_devices=tuple(s.num_devices for s in space.submeshes),
            submesh_groups=tuple(s.group for s in space.submeshes),
            num_microbatches=self.count,
            stage_seconds=table,
            transfer_seconds=search.transfers(self.count),
            in_flight=tuple(self.rows.index(f) + 1 for f in self.flights),
            max_stages=search.stage_limit,
        )
        return self.problem

    def _priced(self, view: LogicalMesh) -> StagePrices:
        search = self._search
        rows = [
            search.prices.stage_seconds(
                view, self.count, search.counts, flight, search.space.budget_of(view)
            )
            for flight in self.rows
        ]
        return StagePrices(*(np.stack(parts) for parts in zip(*rows, strict=True)))

    def ranked_views(self, stage: StageChoice) -> list[RankedView]:
        """Of the stage's submesh, the best first."""
        search = self._search
        row = search.index[stage.first_layer, stage.last_layer]
        entries = []
        for order, view in enumerate(search.space.views[search.space.submeshes[stage.submesh]]):
            seconds, exact, fits = (part[stage.in_flight - 1, row] for part in self._parts[view])
            ranked = RankedView(float(seconds), view, bool(exact), bool(fits))
            entries.append((ranked.seconds, order, ranked))
        return [ranked for _, _, ranked in sorted(entries, key=lambda e: e[:2])]


class RankedView(NamedTuple):
    """A view of a stage, with the stage's seconds on it: see `StagePrices`."""

    seconds: float
    view: LogicalMesh
    exact: bool
    fits: bool


class CutSearch:
    """Cuts from the fastest on; every stage of a cut has an exact table entry.

    reference: the program at the smallest number of microbatches.
    """

    def __init__(
        self,
        space: Space,
        prices: Prices,
        reference: Program,
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        clock: Clock,
    ) -> None:
        self.space, self.prices, self.reference = space, prices, reference
        self.num_layers = reference.num_layers
        self.counts, self.index = reference.stage_counts()
        smallest = min(s.num_devices for s in space.submeshes)
        pinned = space.options.num_stages
        self.stage_limit = pinned or min(self.num_layers, space.cluster.num_devices // smallest)
        self.failures: list[NoFeasiblePlan] = []
        self.num_programs = 0
        self._mesh_costs, self._clock = mesh_costs, clock
        self._by_count: dict[int, _Tables] = {}
        self._heap: list[_Item] = []
        self._best = math.inf

    def __iter__(self) -> Iterator[Cut]:
        first = self.space.microbatch_counts[0]
        for submesh in self.usable():
            for view in self.space.views[submesh]:
                self.raise_view(view, first)
        for count in self.space.microbatch_counts:
            self._heap.append(_Item(0.0, count, 0))
        while self._heap:
            item = heapq.heappop(self._heap)
            tables = self.tables(item.num_microbatches)
            problem = tables.refresh()
            if item.num_stages == 0:
                self._open(item, problem)
            elif self._exact(item, tables):
                self._best = min(self._best, item.seconds)
                yield self._cut(item, tables)
            elif item.seconds < _WORTH_PRICING * self._best:
                self._raise_path(item, tables)

    @property
    def bound(self) -> float:
        """No cut that is still to come has a smaller table value."""
        return self._heap[0].seconds if self._heap else math.inf

    def transfers(self, count: int) -> FloatArray:
        """[K, M] seconds per microbatch that a stage spends receiving."""
        scale = self.reference.num_microbatches / count
        out = np.zeros((self.num_layers, len(self.space.submeshes)))
        for m, submesh in enumerate(self.space.submeshes):
            costs = self._mesh_costs(self.space.views[submesh][0])
            for layer, nbytes in enumerate(self.reference.crossing):
                if nbytes:
                    out[layer, m] = costs.receive_seconds(scale * nbytes / submesh.num_devices)
        return out

    def usable(self) -> tuple[Submesh, ...]:
        """Submeshes that some cut can have."""
        if self.stage_limit > 1:
            return self.space.submeshes
        whole = self.space.cluster.num_devices
        return tuple(s for s in self.space.submeshes if s.num_devices == whole)

    def raise_view(self, view: LogicalMesh, count: int, *, fits: bool = True) -> None:
        counts = self.space.microbatch_counts
        # the most microbatches may have one row each, whose graph is not like the others
        largest = counts[-1] if len(counts) < 3 else counts[-2]
        with self._clock.passes("layer points", f"mesh {view}, {count} microbatch(es)"):
            self.prices.raise_level(view, count, counts[0], largest, fits=fits)

    def tables(self, count: int) -> _Tables:
        """Made when they are asked for."""
        if count not in self._by_count:
            self._by_count[count] = _Tables(self, count)
        return self._by_count[count]

    def _open(self, item: _Item, problem: InterOpProblem) -> None:
        """From all numbers of stages to each that is near the best."""
        pinned = self.space.options.num_stages
        version = self.tables(item.num_microbatches).version
        for num_stages, found in self._solve(problem, pinned).items():
            new = _Item(found.seconds, item.num_microbatches, num_stages, found, version)
            heapq.heappush(self._heap, new)

    def _solve(self, problem: InterOpProblem, num_stages: int | None) -> dict[int, InterOpSolution]:
        """By number of stages, all of them or one; empty where nothing fits."""
        self.num_programs += 1
        if num_stages is not None:
            problem = problem.with_stages(num_stages)
        try:
            with self._clock.passes("stage cut", f"{num_stages or 'any number of'} stages"):
                return dp.solve_each_count(problem, within=_COUNT_MARGIN)
        except NoFeasiblePlan as error:
            self.failures.append(error)
            return {}

    def _exact(self, item: _Item, tables: _Tables) -> bool:
        """Whether the item was found in tables that are still those, and exact on its path."""
        assert item.found is not None
        return item.version == tables.version and all(
            tables.ranked_views(stage)[0].exact for stage in item.found.stages
        )

    def _raise_path(self, item: _Item, tables: _Tables) -> None:
        """Prices better what was not exact on the item's path; the item goes back with its new
        least step."""
        assert item.found is not None
        wanted = [tables.ranked_views(s)[0] for s in item.found.stages]
        if item.version == tables.version:
            inexact = {w.view: w.fits for w in wanted if not w.exact}
            for view, fits in inexact.items():
                self.raise_view(view, item.num_microbatches, fits=fits)
        for found in self._solve(tables.refresh(), item.num_stages).values():
            again = _Item(
                found.seconds, item.num_microbatches, item.num_stages, found, tables.version
            )
            heapq.heappush(self._heap, again)

    def _cut(self, item: _Item, tables: _Tables) -> Cut:
        assert item.found is not None
        space = self.space
        views = tuple(
            tuple(
                (entry.seconds, entry.view)
                for entry in ranked[:_VIEWS]
                if entry.seconds <= _WORTH_SOLVING * ranked[0].seconds
            )
            for ranked in map(tables.ranked_views, item.found.stages)
        )
        return Cut(
            first_layers=tuple(s.first_layer for s in item.found.stages),
            submeshes=tuple(space.submeshes[s.submesh] for s in item.found.stages),
            views=views,
            seconds=item.found.seconds,
            num_microbatches=item.num_microbatches,
        )
