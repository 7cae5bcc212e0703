"""Stage cuts in order of promise: the inter-op program over tables that are exact only where it
looks.

    until the best cut's stages are all exact:  solve the inter-op program, raise the level of the
                                                views on its path

Tables rise as they are priced, so that the first cut whose stages are exact is the best of the
exact tables, up to the margins below; of the others only what a path touched was ever priced.
Tables know single layers: whole stages can be faster or slower (`search.exact`). One such search
runs for each number of microbatches, the most promising first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autopar.candidate import Cut
from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts
from autopar.interop import dp
from autopar.interop.problem import InterOpProblem, InterOpSolution
from autopar.mesh import LogicalMesh, Submesh
from autopar.search.clock import Clock
from autopar.search.prices import Level, Prices
from autopar.search.program import Program
from autopar.search.space import Space
from autopar.search.tables import FEW_LAYERS, RankedView, Tables
from autopar.search.uniform import focus

FloatArray = NDArray[np.float64]

_VIEWS = 2  # of a stage's submesh that are solved exactly
WORTH_SOLVING = 1.06  # a view or cut whose table value is this much above the best is not
_MOVES_GAIN = 1.1  # at most, about: cuts further away are left as they are
_WORTH_PRICING = 0.995  # of the best exact cut: what cannot be faster than that is not priced
_SMALL_CLUSTER = 16  # devices: so few that every size and number of microbatches is looked at
_PROGRAM_GAP = 1e-3  # of the inter-op program
_COUNT_MARGIN_FEW = 1.5  # where there are few layers
_COUNT_MARGIN = 1.05  # a number of stages this much worse than the best one is not followed
_ONCE_MARGIN = 1.25  # the inter-op program counts once-per-step work of every stage


@dataclass(slots=True)
class _Found:
    """The cuts of one number of microbatches by number of stages, those still to come. They are
    optimal while nothing on their paths has been priced higher since."""

    by_stages: dict[int, InterOpSolution]
    steps: dict[int, float] = field(default_factory=dict)  # see Tables.step_seconds
    done: set[int] = field(default_factory=set)

    @property
    def best(self) -> tuple[float, InterOpSolution] | None:
        """(step, cut) of the fastest that is left."""
        left = [s for s in self.by_stages if s not in self.done]
        found = min(left, key=lambda s: (self.steps[s], s), default=None)
        return None if found is None else (self.steps[found], self.by_stages[found])


class CutSearch:
    """Cuts from the fastest on; every stage of a cut has an exact table entry.

    reference: the program at the smallest number of microbatches. narrow: False to leave out no
    number of microbatches or stages, however slow they look.
    """

    def __init__(
        self,
        space: Space,
        prices: Prices,
        reference: Program,
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        clock: Clock,
        *,
        narrow: bool = True,
    ) -> None:
        self.space, self.prices, self.reference = space, prices, reference
        self.num_layers = reference.num_layers
        self.counts, self.index = reference.stage_counts()
        smallest = min(s.num_devices for s in space.submeshes)
        pinned = space.options.num_stages
        self.stage_limit = pinned or min(self.num_layers, space.cluster.num_devices // smallest)
        self.failures: list[NoFeasiblePlan] = []
        self._mesh_costs, self._clock = mesh_costs, clock
        self._by_count: dict[int, Tables] = {}
        self._heap: list[tuple[float, int]] = []  # least step, number of microbatches
        self._found: dict[int, _Found] = {}
        self._least: dict[tuple[LogicalMesh, int, int], FloatArray] = {}
        self._transfers: dict[int, FloatArray] = {}
        self._best = math.inf
        self._solved_s = 0.0
        margin = _COUNT_MARGIN if self.num_layers > FEW_LAYERS else _COUNT_MARGIN_FEW
        self.margin = margin if narrow else math.inf
        self._narrow = narrow
        self._large = space.cluster.num_devices > _SMALL_CLUSTER
        counts = space.microbatch_counts
        # the most microbatches may have one row each, whose graph is not like the others
        self._ends = counts[0], counts[-1] if len(counts) < 3 else counts[-2]
        self.sizes: Mapping[int, tuple[Submesh, ...]] = dict.fromkeys(counts, space.submeshes)
        self.note = ""  # what was left out

    def _focus(self) -> None:
        """Only what is near the best equal pipeline."""
        found = focus(
            self.space,
            self.prices,
            self.reference,
            self._mesh_costs,
            self.raise_views,
            self._clock,
        )
        self.space, self.sizes, self.note = found.space, found.sizes, found.note

    def __iter__(self) -> Iterator[Cut]:
        if self.stage_limit > 1 and self._narrow and self._large:
            self._focus()
        for count in self.space.microbatch_counts:
            usable = [view for s in self.usable(count) for view in self.space.views[s]]
            first = self._anchors(count)[0]
            self.raise_views({v: True for v in usable if not self.prices.known(v, first)}, count)
            self._solve(count)
        while self._heap and not (self._clock.expired and self._best < math.inf):
            _, count = heapq.heappop(self._heap)
            step_s, best = self._found[count].best or (math.inf, None)
            if best is None:
                continue
            tables = self.tables(count)
            problem = tables.refresh()
            if not _still_holds(best, problem):
                self._solve(count)
                continue
            ranked = [tables.ranked_views(stage) for stage in best.stages]
            inexact = {r[0].view: r[0].fits for r in ranked if not r[0].exact}
            if not inexact and not tables.played(best.stages):
                tables.play(best.stages)
                steps = self._found[count].steps
                steps[len(best.stages)] = tables.step_seconds(best.stages)
                self._push(count)
            elif not inexact:
                self._best = min(self._best, step_s)
                yield self._cut(count, best, ranked, step_s)
                self._found[count].done.add(len(best.stages))
                self._push(count)
            elif step_s < _WORTH_PRICING * self._worth_s():
                self.raise_views(inexact, count)
                self._push(count)

    def solved(self, step_s: float) -> None:
        """The best step of a cut that is solved: what the tables put below it may be faster."""
        self._solved_s = step_s

    def _worth_s(self) -> float:
        """What a cut has to be below to be priced. On large clusters, where prices are dear, the
        tables are believed."""
        if self._large:
            return self._best
        return max(self._best, min(self._solved_s, WORTH_SOLVING * self._best))

    def transfers(self, count: int) -> FloatArray:
        """[K, M] seconds per microbatch that a stage spends receiving."""
        if count not in self._transfers:
            self._transfers[count] = self._received(count)
        return self._transfers[count]

    def _received(self, count: int) -> FloatArray:
        scale = self.reference.num_microbatches / count
        out = np.zeros((self.num_layers, len(self.space.submeshes)))
        for m, submesh in enumerate(self.space.submeshes):
            costs = self._mesh_costs(self.space.views[submesh][0])
            for layer, nbytes in enumerate(self.reference.crossing):
                if nbytes:
                    out[layer, m] = costs.receive_seconds(scale * nbytes / submesh.num_devices)
        return out

    def usable(self, count: int) -> tuple[Submesh, ...]:
        """Submeshes that some cut can have."""
        if self.stage_limit > 1:
            return self.sizes[count]
        whole = self.space.cluster.num_devices
        return tuple(s for s in self.sizes[count] if s.num_devices == whole)

    def _anchors(self, count: int) -> tuple[int, int]:
        """The numbers of microbatches from which prices at others are scaled. Where few are left,
        each is priced itself."""
        return (count, count) if self.note else self._ends

    def raise_views(
        self, views: Mapping[LogicalMesh, bool], count: int, anchors: tuple[int, int] | None = None
    ) -> None:
        """views: with whether the stage that asks fits with its fastest solutions."""
        if not views:
            return
        meshes = ", ".join(map(str, views)) if len(views) <= 3 else f"{len(views)} meshes"
        with self._clock.passes("layer points", f"{meshes}, {count} microbatch(es)"):
            self.prices.raise_levels(views, count, *(anchors or self._anchors(count)))

    def raise_to_free(self, count: int) -> None:
        """Every view that some cut can have, at this number of microbatches."""
        usable = [view for submesh in self.usable(count) for view in self.space.views[submesh]]
        while low := [v for v in usable if self.prices.level(v, count) < Level.FREE]:
            self.raise_views(dict.fromkeys(low, True), count)

    def least_seconds(
        self, view: LogicalMesh, count: int, first: int, stop: int, in_flight: int
    ) -> float:
        """What a stage of the layers first .. stop - 1 takes at least per microbatch: see
        `Prices.least_seconds`."""
        key = view, count, in_flight
        if key not in self._least:
            budget = self.space.budget_of(view)
            self._least[key] = self.prices.least_seconds(
                view, count, self.counts, in_flight, budget
            )
        return float(self._least[key][self.index[first, stop - 1]])

    def tables(self, count: int) -> Tables:
        """Made when they are asked for."""
        if count not in self._by_count:
            stages, transfers = (self.counts, self.index), self.transfers(count)
            self._by_count[count] = Tables(
                self.space, self.sizes[count], self.prices, stages, transfers, count
            )
        return self._by_count[count]

    def _push(self, count: int) -> None:
        best = self._found[count].best
        if best is not None:
            heapq.heappush(self._heap, (best[0], count))

    def _solve(self, count: int) -> None:
        """The inter-op program for all numbers of stages that are left, in tables as they are."""
        problem = self.tables(count).refresh()
        found = self._found.setdefault(count, _Found({}))
        pinned = self.space.options.num_stages
        try:
            with self._clock.passes("stage cut", f"{count} microbatch(es)"):
                by_stages = dp.solve_each_count(
                    problem.with_stages(pinned) if pinned else problem,
                    relative_gap=_PROGRAM_GAP,
                    within=self.margin * _ONCE_MARGIN,
                )
        except NoFeasiblePlan as error:
            self.failures.append(error)
            by_stages = {}
        tables = self.tables(count)
        steps = {s: tables.step_seconds(f.stages) for s, f in by_stages.items()}
        near = self.margin * _MOVES_GAIN * min(steps.values(), default=math.inf)
        found.by_stages = {
            s: replace(f, stages=tables.moved(f.stages))
            for s, f in by_stages.items()
            if steps[s] <= near
        }
        found.steps = {s: tables.step_seconds(f.stages) for s, f in found.by_stages.items()}
        most = self.margin * min(found.steps.values(), default=math.inf)
        found.by_stages = {s: f for s, f in found.by_stages.items() if found.steps[s] <= most}
        self._push(count)

    def _cut(
        self,
        count: int,
        found: InterOpSolution,
        ranked: Sequence[Sequence[RankedView]],
        step_s: float,
    ) -> Cut:
        views = tuple(
            tuple(
                (entry.seconds, entry.view)
                for entry in entries[:_VIEWS]
                if entry.seconds <= WORTH_SOLVING * entries[0].seconds
            )
            for entries in ranked
        )
        return Cut(
            first_layers=tuple(s.first_layer for s in found.stages),
            submeshes=tuple(self.space.submeshes[s.submesh] for s in found.stages),
            views=views,
            seconds=step_s,
            num_microbatches=count,
            schedule=self.space.table_schedule,
        )


def _still_holds(found: InterOpSolution, problem: InterOpProblem) -> bool:
    """Whether the tables have not risen on the path: then it is still optimal, as elsewhere they
    can only have risen."""
    return all(
        problem.stage_seconds[s.in_flight - 1][s.first_layer, s.last_layer, s.submesh]
        + problem.transfer_seconds[s.first_layer, s.submesh]
        == s.seconds
        for s in found.stages
    )
