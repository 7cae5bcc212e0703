"""Stage costs at one number of microbatches, as the prices known by then make them; and the step of
a cut whose stages are not solved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.interop.problem import InterOpProblem, StageChoice
from autopar.intraop.compose import StageParts
from autopar.mesh import LogicalMesh, Submesh
from autopar.schedule import ScheduleKind, in_flight_count
from autopar.search.prices import Prices, SplitFlight, StagePrices
from autopar.search.schedules import Expected, expected_seconds, rough_seconds
from autopar.search.space import Space

FloatArray = NDArray[np.float64]

FEW_LAYERS = 8  # of so few layers the tables know less
_CLOSE = 1.005  # seconds that are about equal
_WORTH_MOVING = 0.9999  # of a step: a layer that gains less is not moved
_ROUNDING = 1 + 1e-9


class Tables:
    """Stage costs at one number of microbatches: per in-flight row and distinct stage, the best
    view of each submesh."""

    def __init__(
        self,
        space: Space,
        sizes: Sequence[Submesh],
        prices: Prices,
        stages: tuple[NDArray[np.int64], NDArray[np.int64]],
        transfers: FloatArray,
        count: int,
    ) -> None:
        """sizes: the submeshes that may be used. stages: of `Program.stage_counts`. transfers:
        [K, M] seconds per microbatch that a stage spends receiving."""
        self._counts, self._index = stages
        self._num_layers = len(self._index)
        pinned = space.options.num_stages
        least = min(s.num_devices for s in sizes)
        limit = pinned or min(self._num_layers, space.cluster.num_devices // least)
        self.count, self.stage_limit = count, limit
        self.flights = [in_flight_count(space.table_schedule, s + 1, count) for s in range(limit)]
        self.rows = sorted(set(self.flights))
        self._space, self._sizes, self._prices = space, sizes, prices
        self._transfers = transfers
        self._levels: dict[LogicalMesh, tuple[int, int, bool]] = {}
        self._parts: dict[LogicalMesh, StagePrices] = {}
        self.problem: InterOpProblem | None = None
        self.version = 0
        self._known_parts: dict[tuple[int, int, int], StageParts] = {}
        self._known: dict[StageChoice, Expected] = {}
        self._played: dict[tuple[StageChoice, ...], float] = {}

    def refresh(self) -> InterOpProblem:
        """The inter-op program at the levels that the views have reached by now."""
        space = self._space
        changed = self.problem is None
        for submesh in self._sizes:
            for view in space.views[submesh]:
                state = self._prices.state(view, self.count)
                if self._levels.get(view) != state:
                    self._levels[view] = state
                    self._parts[view] = self._priced(view)
                    changed = True
        if not changed:
            assert self.problem is not None
            return self.problem
        self.version += 1
        self._known_parts.clear()
        self._known.clear()
        layers = self._num_layers
        table = np.full((len(self.rows), layers, layers, len(space.submeshes)), math.inf)
        first, last = np.triu_indices(layers)
        for m, submesh in enumerate(space.submeshes):
            if submesh in self._sizes:
                seconds = np.min([self._parts[v][0] for v in space.views[submesh]], axis=0)
                table[:, first, last, m] = seconds[:, self._index[first, last]]
        self.problem = InterOpProblem(
            num_layers=layers,
            num_devices=tuple(group.num_devices for group in space.cluster.groups),
            submesh_devices=tuple(s.num_devices for s in space.submeshes),
            submesh_groups=tuple(s.group for s in space.submeshes),
            num_microbatches=self.count,
            stage_seconds=table,
            transfer_seconds=self._transfers,
            in_flight=tuple(self.rows.index(f) + 1 for f in self.flights),
            max_stages=self.stage_limit,
            bubble=self._space.bubble if self.count > 1 and layers > FEW_LAYERS else 1.0,
        )
        return self.problem

    def _priced(self, view: LogicalMesh) -> StagePrices:
        rows = [
            self._prices.stage_seconds(
                view, self.count, self._counts, flight, self._space.budget_of(view)
            )
            for flight in self.rows
        ]
        return StagePrices(*(np.stack(parts) for parts in zip(*rows, strict=True)))

    def step_seconds(self, stages: Sequence[StageChoice]) -> float:
        """Of a cut, as its schedule was played, or roughly."""
        known = self._played.get(tuple(stages))
        if known is not None:
            return known
        bubble = self._space.bubble if self._has_room(stages) else 1.0
        return rough_seconds(list(map(self._expected, stages)), self.count, bubble)

    def moved(self, stages: Sequence[StageChoice]) -> tuple[StageChoice, ...]:
        """The cut with layers moved from stage to stage while its step gets shorter: the inter-op
        program holds transfers against the slowest stage, which it need not wait for. Of few
        layers the step is known too little for that."""
        best, best_s = tuple(stages), self.step_seconds(stages)
        while self._num_layers > FEW_LAYERS:
            most_s = best_s * _WORTH_MOVING
            trials = (self._with_move(best, *move, most_s) for move in _moves(best))
            moves = [trial for trial in trials if trial]
            steps = [self.step_seconds(trial) for trial in moves]
            least = min(steps, default=math.inf)
            if least >= most_s:
                return best
            best, best_s = moves[steps.index(least)], least
        return best

    def _with_move(
        self, stages: tuple[StageChoice, ...], source: int, target: int, most_s: float
    ) -> tuple[StageChoice, ...]:
        """With a layer of the source in the target, and those between moved on by one; none where
        some stage does not fit, or alone is busy for the step `most_s`: no schedule is faster than
        B t_i without its transfers. O(stages between the two)."""
        assert self.problem is not None
        busy_s = most_s * _ROUNDING / self.count
        low, high = min(source, target), max(source, target)
        on = 1 if target < source else -1  # where the bounds between the two go
        found = []
        for index in range(low, high + 1):
            stage = stages[index]
            first, last = stage.first_layer, stage.last_layer
            first += on * (index > low)
            last += on * (index < high)
            row = self.problem.stage_seconds[stage.in_flight - 1]
            seconds = float(row[first, last, stage.submesh])
            if seconds >= busy_s:  # also where it is inf
                return ()
            seconds += float(self.problem.transfer_seconds[first, stage.submesh])
            found.append(StageChoice(first, last, stage.submesh, stage.in_flight, seconds))
        return (*stages[:low], *found, *stages[high + 1 :])

    def played(self, stages: Sequence[StageChoice]) -> bool:
        return tuple(stages) in self._played

    def play(self, stages: Sequence[StageChoice]) -> None:
        """From now on the cut's step is that of its schedule, played."""
        space, count = self._space, self.count
        kinds = [space.table_schedule]
        if self._has_room(stages):
            kinds.append(ScheduleKind.ZB_H1)
        expected = list(map(self._expected, stages))
        seconds = (expected_seconds(expected, count, kind) for kind in dict.fromkeys(kinds))
        self._played[tuple(stages)] = min(seconds)

    def _has_room(self, stages: Sequence[StageChoice]) -> bool:
        """Whether ZB-H1 is allowed, and what waits for its W fits beside the rest."""
        return ScheduleKind.ZB_H1 in self._space.schedules and all(
            SplitFlight.zb_h1(index, len(stages), self.count).fits(
                self._stage_parts(stage),
                self._space.budgets[self._space.submeshes[stage.submesh].group],
            )
            for index, stage in enumerate(stages)
        )

    def _received(self, stage: StageChoice) -> float:
        return float(self._transfers[stage.first_layer, stage.submesh])

    def _expected(self, stage: StageChoice) -> Expected:
        if stage not in self._known:
            received_s = self._received(stage)
            once_s = self._stage_parts(stage).once_s
            seconds = max(0.0, stage.seconds - received_s - once_s)
            self._known[stage] = Expected(seconds, received_s, self.count * once_s)
        return self._known[stage]

    def _stage_parts(self, stage: StageChoice) -> StageParts:
        """On the stage's best view."""
        row = int(self._index[stage.first_layer, stage.last_layer])
        key = row, stage.submesh, stage.in_flight
        if key not in self._known_parts:
            views = self._space.views[self._space.submeshes[stage.submesh]]
            view = min(views, key=lambda v: float(self._parts[v].seconds[stage.in_flight - 1, row]))
            self._known_parts[key] = self._prices.stage_parts(
                view,
                self.count,
                self._counts[row],
                self.rows[stage.in_flight - 1],
                self._space.budget_of(view),
            )
        return self._known_parts[key]

    def ranked_views(self, stage: StageChoice) -> list[RankedView]:
        """Of the stage's submesh, the best first; of those that are about equal the exact ones, and
        those of fewer axes, which are priced sooner."""
        row = self._index[stage.first_layer, stage.last_layer]
        entries = []
        for order, view in enumerate(self._space.views[self._space.submeshes[stage.submesh]]):
            seconds, exact, fits = (part[stage.in_flight - 1, row] for part in self._parts[view])
            entries.append((order, RankedView(float(seconds), view, bool(exact), bool(fits))))
        close = _CLOSE * min(ranked.seconds for _, ranked in entries)

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


def _moves(stages: Sequence[StageChoice]) -> Iterator[tuple[int, int]]:
    """Of a layer, from stage to stage: to a neighbour, or from the slowest to any other."""
    number = len(stages)
    slowest = max(range(number), key=lambda i: stages[i].seconds)
    for source, stage in enumerate(stages):
        if stage.last_layer > stage.first_layer:
            near = range(number) if source == slowest else (source - 1, source + 1)
            yield from ((source, t) for t in near if t != source and 0 <= t < number)
