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
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.candidate import Cut
from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts
from autopar.interop import dp
from autopar.interop.problem import InterOpProblem, InterOpSolution, StageChoice
from autopar.mesh import LogicalMesh, Submesh
from autopar.schedule import ScheduleKind, in_flight_count
from autopar.search.clock import Clock
from autopar.search.prices import CLOSE, Level, Prices, SplitFlight, StagePrices
from autopar.search.program import Program
from autopar.search.schedules import Expected, expected_seconds, rough_seconds
from autopar.search.space import Space
from autopar.search.uniform import focus

FloatArray = NDArray[np.float64]

_VIEWS = 2  # of a stage's submesh that are solved exactly
WORTH_SOLVING = 1.06  # a view or cut whose table value is this much above the best is not
_MOVES_GAIN = 1.1  # at most, about: cuts further away are left as they are
_WORTH_MOVING = 0.9999  # of a step: a layer that gains less is not moved
_WORTH_PRICING = 0.995  # of the best exact cut: what cannot be faster than that is not priced
_SMALL_CLUSTER = 16  # devices: so few that every size and number of microbatches is looked at
_PROGRAM_GAP = 1e-3  # of the inter-op program
FEW_LAYERS, _COUNT_MARGIN_FEW = 8, 1.5  # of few layers the tables know less
_COUNT_MARGIN = 1.05  # a number of stages this much worse than the best one is not followed
_ONCE_MARGIN = 1.25  # the inter-op program counts once-per-step work of every stage


@dataclass(slots=True)
class _Found:
    """The cuts of one number of microbatches by number of stages, those still to come. They are
    optimal while nothing on their paths has been priced higher since."""

    by_stages: dict[int, InterOpSolution]
    steps: dict[int, float] = field(default_factory=dict)  # see _Tables.step_seconds
    done: set[int] = field(default_factory=set)

    @property
    def best(self) -> tuple[float, InterOpSolution] | None:
        """(step, cut) of the fastest that is left."""
        left = [s for s in self.by_stages if s not in self.done]
        found = min(left, key=lambda s: (self.steps[s], s), default=None)
        return None if found is None else (self.steps[found], self.by_stages[found])


class _Tables:
    """Stage costs at one number of microbatches: per in-flight row and distinct stage, the best
    view of each submesh."""

    def __init__(self, search: CutSearch, count: int) -> None:
        space = search.space
        pinned = space.options.num_stages
        least = min(s.num_devices for s in search.sizes[count])
        limit = pinned or min(search.num_layers, space.cluster.num_devices // least)
        self.count, self.stage_limit = count, limit
        self.flights = [in_flight_count(space.table_schedule, s + 1, count) for s in range(limit)]
        self.rows = sorted(set(self.flights))
        self._search = search
        self._levels: dict[LogicalMesh, tuple[int, int, bool]] = {}
        self._parts: dict[LogicalMesh, StagePrices] = {}
        self.problem: InterOpProblem | None = None
        self.version = 0
        self._once: dict[tuple[int, int, int], float] = {}
        self._best_view: dict[tuple[int, int, int], LogicalMesh] = {}
        self._split: dict[tuple[int, LogicalMesh, int, int], float] = {}
        self._known: dict[StageChoice, Expected] = {}
        self._played: dict[tuple[StageChoice, ...], float] = {}

    def refresh(self) -> InterOpProblem:
        """The inter-op program at the levels that the views have reached by now."""
        search, space = self._search, self._search.space
        changed = self.problem is None
        sizes = search.sizes[self.count]
        for submesh in sizes:
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
        self._once.clear()
        self._best_view.clear()
        self._split.clear()
        self._known.clear()
        layers = search.num_layers
        table = np.full((len(self.rows), layers, layers, len(space.submeshes)), math.inf)
        first, last = np.triu_indices(layers)
        for m, submesh in enumerate(space.submeshes):
            if submesh in sizes:
                seconds = np.min([self._parts[v][0] for v in space.views[submesh]], axis=0)
                table[:, first, last, m] = seconds[:, search.index[first, last]]
        self.problem = InterOpProblem(
            num_layers=layers,
            num_devices=tuple(group.num_devices for group in space.cluster.groups),
            submesh_devices=tuple(s.num_devices for s in space.submeshes),
            submesh_groups=tuple(s.group for s in space.submeshes),
            num_microbatches=self.count,
            stage_seconds=table,
            transfer_seconds=search.transfers(self.count),
            in_flight=tuple(self.rows.index(f) + 1 for f in self.flights),
            max_stages=self.stage_limit,
            bubble=search.space.bubble if self.count > 1 and layers > FEW_LAYERS else 1.0,
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

    def step_seconds(self, stages: Sequence[StageChoice]) -> float:
        """Of a cut, as its schedule was played, or roughly."""
        known = self._played.get(tuple(stages))
        if known is not None:
            return known
        bubble = self._search.space.bubble if self._has_room(stages) else 1.0
        return rough_seconds(list(map(self._expected, stages)), self.count, bubble)

    def moved(self, stages: Sequence[StageChoice]) -> tuple[StageChoice, ...]:
        """The cut with layers moved from stage to stage while its step gets shorter: the inter-op
        program holds transfers against the slowest stage, which it need not wait for. Of few
        layers the step is known too little for that."""
        best, best_s = tuple(stages), self.step_seconds(stages)
        while self._search.num_layers > FEW_LAYERS:
            moves = [self._with_sizes(best, sizes) for sizes in _moves(best)]
            steps = [self.step_seconds(trial) if trial else math.inf for trial in moves]
            least = min(steps, default=math.inf)
            if least >= best_s * _WORTH_MOVING:
                return best
            best, best_s = moves[steps.index(least)], least
        return best

    def _with_sizes(
        self, stages: Sequence[StageChoice], sizes: Sequence[int]
    ) -> tuple[StageChoice, ...]:
        """The stages with so many layers each; none where some stage does not fit."""
        assert self.problem is not None
        found, first = [], 0
        for stage, size in zip(stages, sizes, strict=True):
            last = first + size - 1
            row = self.problem.stage_seconds[stage.in_flight - 1]
            seconds = float(row[first, last, stage.submesh])
            seconds += float(self.problem.transfer_seconds[first, stage.submesh])
            if math.isinf(seconds):
                return ()
            found.append(StageChoice(first, last, stage.submesh, stage.in_flight, seconds))
            first = last + 1
        return tuple(found)

    def played(self, stages: Sequence[StageChoice]) -> bool:
        return tuple(stages) in self._played

    def play(self, stages: Sequence[StageChoice]) -> None:
        """From now on the cut's step is that of its schedule, played."""
        space, count = self._search.space, self.count
        kinds = [space.table_schedule]
        if self._has_room(stages):
            kinds.append(ScheduleKind.ZB_H1)
        expected = list(map(self._expected, stages))
        seconds = (expected_seconds(expected, count, kind) for kind in dict.fromkeys(kinds))
        self._played[tuple(stages)] = min(seconds)

    def _has_room(self, stages: Sequence[StageChoice]) -> bool:
        """Whether ZB-H1 is allowed, and what waits for its W slows no stage down."""
        return ScheduleKind.ZB_H1 in self._search.space.schedules and all(
            self._split_seconds(stage, index, len(stages))
            <= CLOSE * (stage.seconds - self._received(stage))
            for index, stage in enumerate(stages)
        )

    def _split_seconds(self, stage: StageChoice, index: int, num_stages: int) -> float:
        """Of a microbatch, where backward is split; transfers not included."""
        search = self._search
        row, view = self._row_and_view(stage)
        key = row, view, index, num_stages
        if key not in self._split:
            self._split[key] = float(
                search.prices.split_seconds(
                    view,
                    self.count,
                    search.counts[row, None],
                    SplitFlight.zb_h1(index, num_stages, self.count),
                    search.space.budget_of(view),
                )[0]
            )
        return self._split[key]

    def _row_and_view(self, stage: StageChoice) -> tuple[int, LogicalMesh]:
        """The stage's row of `counts`, and its best view."""
        search = self._search
        row = int(search.index[stage.first_layer, stage.last_layer])
        key = row, stage.submesh, stage.in_flight
        if key not in self._best_view:
            views = search.space.views[search.space.submeshes[stage.submesh]]
            self._best_view[key] = min(
                views, key=lambda v: float(self._parts[v].seconds[stage.in_flight - 1, row])
            )
        return row, self._best_view[key]

    def _received(self, stage: StageChoice) -> float:
        return float(self._search.transfers(self.count)[stage.first_layer, stage.submesh])

    def _expected(self, stage: StageChoice) -> Expected:
        if stage not in self._known:
            received_s = self._received(stage)
            once_s = self._once_seconds(stage)
            seconds = max(0.0, stage.seconds - received_s - once_s)
            self._known[stage] = Expected(seconds, received_s, self.count * once_s)
        return self._known[stage]

    def _once_seconds(self, stage: StageChoice) -> float:
        """Of a microbatch, on the stage's best view."""
        search = self._search
        row, view = self._row_and_view(stage)
        key = row, stage.submesh, stage.in_flight
        if key not in self._once:
            self._once[key] = search.prices.once_seconds(
                view,
                self.count,
                search.counts[row],
                self.rows[stage.in_flight - 1],
                search.space.budget_of(view),
            )
        return self._once[key]

    def ranked_views(self, stage: StageChoice) -> list[RankedView]:
        """Of the stage's submesh, the best first; of those that are about equal the exact ones, and
        those of fewer axes, which are priced sooner."""
        search = self._search
        row = search.index[stage.first_layer, stage.last_layer]
        entries = []
        for order, view in enumerate(search.space.views[search.space.submeshes[stage.submesh]]):
            seconds, exact, fits = (part[stage.in_flight - 1, row] for part in self._parts[view])
            entries.append((order, RankedView(float(seconds), view, bool(exact), bool(fits))))
        close = CLOSE * min(ranked.seconds for _, ranked in entries)

        def place(entry: tuple[int, RankedView]) -> tuple[float, bool, int, int]:
            order, ranked = entry
            near = ranked.seconds <= close
            return (
                close if near else ranked.seconds,
                not ranked.exact,
                ranked.view.num_axes,
                order,
            )

        return [ranked for _, ranked in sorted(entries, key=place)]


class RankedView(NamedTuple):
    """A view of a stage, with the stage's seconds on it: see `StagePrices`."""

    seconds: float
    view: LogicalMesh
    exact: bool
    fits: bool


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
        self._by_count: dict[int, _Tables] = {}
        self._heap: list[tuple[float, int]] = []  # least step, number of microbatches
        self._found: dict[int, _Found] = {}
        self._least: dict[tuple[LogicalMesh, int, int], FloatArray] = {}
        self._transfers: dict[int, FloatArray] = {}
        self._best = math.inf
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
            elif step_s < _WORTH_PRICING * self._best:
                self.raise_views(inexact, count)
                self._push(count)

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

    def tables(self, count: int) -> _Tables:
        """Made when they are asked for."""
        if count not in self._by_count:
            self._by_count[count] = _Tables(self, count)
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


def _moves(stages: Sequence[StageChoice]) -> Iterator[list[int]]:
    """Numbers of layers: one moved to a neighbour, or from the slowest stage to any other."""
    sizes = [stage.last_layer - stage.first_layer + 1 for stage in stages]
    slowest = max(range(len(stages)), key=lambda i: stages[i].seconds)
    for source, target in itertools.permutations(range(len(stages)), 2):
        if sizes[source] > 1 and (source == slowest or abs(source - target) == 1):
            moved = list(sizes)
            moved[source] -= 1
            moved[target] += 1
            yield moved


def _still_holds(found: InterOpSolution, problem: InterOpProblem) -> bool:
    """Whether the tables have not risen on the path: then it is still optimal, as elsewhere they
    can only have risen."""
    return all(
        problem.stage_seconds[s.in_flight - 1][s.first_layer, s.last_layer, s.submesh]
        + problem.transfer_seconds[s.first_layer, s.submesh]
        == s.seconds
        for s in found.stages
    )
