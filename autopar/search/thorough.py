"""Every cut of a small problem, its stages solved whole and its schedules simulated.

A plan is a number of microbatches B, a cut into stages, a submesh for each, and for each stage an
option: a view and a policy of recomputation. Plans are looked at by what they take at least, until
that is no less than the best step found:

    step_s >= max over workers w of  max( sum of busy_s,  start + sum of own_s )  over w's stages
    busy_s  = B (forward + backward) + once per step      a worker does one thing at a time
    own_s   = busy_s without the gathers                  these go on while the worker waits
    start   = forward of one microbatch in all stages before w's first

An option is solved when a plan that needs it is looked at. Before, its busy_s is that of its layers
alone (`Prices.least_seconds`); then that of its fastest solution; then the bound of a rough one
within the budget, as if the best one received as much; then its own. Recomputation may be faster
even where all fits: what is not saved needs no layout to be saved in. Cuts are made for the
microbatches in flight of each schedule that is allowed.

Exponential in stages, hence for few stage programs only (`is_small`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.candidate import Candidate, Cut, stage_transfers
from autopar.errors import NoFeasiblePlan, OptionError
from autopar.graph.program import Graph
from autopar.intraop.stage import StageSolution
from autopar.mesh import LogicalMesh, Submesh
from autopar.plan import Remat
from autopar.schedule import ScheduleKind
from autopar.search.cuts import CutSearch
from autopar.search.exact import ExactSolver
from autopar.search.program import Program
from autopar.search.schedules import best_schedule
from autopar.search.solved import SolvedCut
from autopar.search.space import Space

TARGET_GAP = 1e-3  # of a stage
_ROUGH_GAP = 0.1
_SMALL = 60_000  # operators of all stage programs, on every view and of every microbatch size
_WORTH = 1 - 1e-9  # of the best step: rounding is no gain


def is_small(space: Space, reference: Program) -> bool:
    """Whether there are few stage programs: distinct runs of layers x views x microbatches."""
    counts, _ = reference.stage_counts()
    operators = [len(stage.graph.operators) for stage in reference.prepared(space.policies[0])]
    views = sum(len(space.views[submesh]) for submesh in space.submeshes)
    return int((counts @ operators).sum()) * views * len(space.microbatch_counts) <= _SMALL


@dataclass(slots=True, eq=False)
class _Option:
    """A stage on one view under one policy, with lower bounds until it is solved; busy_s is inf
    where it does not fit. fastest: whatever its bytes. rough, solved: within the budget."""

    view: LogicalMesh
    policy: Remat
    busy_s: float
    own_s: float = 0.0
    forward_s: float = 0.0
    fastest: StageSolution | None = None
    rough: StageSolution | None = None
    solved: tuple[Graph, StageSolution] | None = None


class ThoroughSearch:
    """exact: solves every layer as it is (`alike` False). search: its tables, of layers alone,
    bound what is not solved. step_s: what a plan has to beat."""

    def __init__(
        self,
        search: CutSearch,
        exact: ExactSolver,
        program: Callable[[int], Program],
        step_s: float = math.inf,
    ) -> None:
        self.space, self._search, self._exact, self._program = search.space, search, exact, program
        self._options: dict[object, tuple[_Option, ...]] = {}
        self._least_s: dict[object, float] = {}
        self._step_s = step_s
        self._winner: tuple[Cut, Sequence[_Option]] | None = None

    def run(self) -> None:
        """Looks at every cut, or until the time limit."""
        clock, heap = self._exact.clock, list[tuple[float, int, Cut]]()
        for count in self.space.microbatch_counts:
            self._search.raise_to_free(count)
            with clock.passes("every cut", f"{count} microbatch(es)"):
                for cut in (*self._plain(count), *self._interleaved(count)):
                    heap.append((self._bound(cut), len(heap), cut))
        heapq.heapify(heap)
        with clock.passes("exact stages", f"of {len(heap)} cuts"):
            while heap and not clock.expired:
                bound, order, cut = heapq.heappop(heap)
                if bound >= self._step_s * _WORTH:
                    break
                if self._bound(cut) > bound:  # stages have been solved since
                    heapq.heappush(heap, (self._bound(cut), order, cut))
                else:
                    self._look(cut)

    def winner(self) -> SolvedCut | None:
        """The plan that simulates best of those looked at, where it beats step_s."""
        if self._winner is None:
            return None
        cut, options = self._winner
        policies: list[Remat] = []
        for stage, option in enumerate(options):
            first, stop = self._layers(cut, stage)
            policies += [option.policy] * (stop - first)
        views = tuple(((0.0, option.view),) for option in options)
        program = self._program(cut.num_microbatches)
        return self._exact.told(program, replace(cut, views=views), tuple(policies))

    def _look(self, cut: Cut) -> None:
        """At all plans of a cut, promising options first."""
        stages = [self._stage_options(cut, stage) for stage in range(cut.num_stages)]
        ranked = [sorted(options, key=lambda o: o.busy_s) for options in stages]
        for options in itertools.product(*ranked):
            if self._exact.clock.expired:
                return
            found = self._played(cut, options)
            if found is not None and found.step_s < self._step_s * _WORTH:
                self._step_s, self._winner = found.step_s, (cut, options)
                self._exact.clock.incumbent = f"best so far {found.step_s * 1e3:.2f} ms"

    # ---- cuts

    def _plain(self, count: int) -> Iterator[Cut]:
        """Each stage on devices of its own."""
        layers, pinned = self._search.num_layers, self.space.options.num_stages
        kinds = dict.fromkeys((self.space.table_schedule, *self.space.schedules))

        def grow(
            firsts: tuple[int, ...], submeshes: tuple[Submesh, ...], left: tuple[int, ...]
        ) -> Iterator[Cut]:
            if firsts[-1] == layers:
                if any(left) or pinned not in (None, len(submeshes)):
                    return
                flights = set()
                for kind in kinds:
                    cut = Cut(firsts[:-1], submeshes, (), math.inf, count, kind)
                    flight = tuple(map(cut.in_flight, range(cut.num_stages)))
                    if kind is not ScheduleKind.INTERLEAVED and flight not in flights:
                        flights.add(flight)
                        yield cut
                return
            for stop, submesh in itertools.product(
                range(firsts[-1] + 1, layers + 1), self.space.submeshes
            ):
                rest = left[submesh.group] - submesh.num_devices
                if rest >= 0 and self._layers_s(count, firsts[-1], stop, submesh) < self._step_s:
                    after = (*left[: submesh.group], rest, *left[submesh.group + 1 :])
                    yield from grow((*firsts, stop), (*submeshes, submesh), after)

        yield from grow((0,), (), tuple(g.num_devices for g in self.space.cluster.groups))

    def _interleaved(self, count: int) -> Iterator[Cut]:
        """Stages that take turns on equal submeshes."""
        options, layers = self.space.options, self._search.num_layers
        told = options.num_stages is None or options.schedule is not None
        if ScheduleKind.INTERLEAVED not in self.space.schedules or not told:
            return
        devices = self.space.cluster.num_devices
        for submesh in self.space.submeshes:
            workers = devices // submesh.num_devices
            if workers * submesh.num_devices != devices or workers < 2 or count % workers:
                continue
            if len(self.space.cluster.groups) > 1 or options.num_stages not in (None, workers):
                continue
            for stages in range(2 * workers, layers + 1, workers):
                for inner in itertools.combinations(range(1, layers), stages - 1):
                    cut = Cut((0, *inner), (submesh,) * stages, (), math.inf, count)
                    yield replace(cut, schedule=ScheduleKind.INTERLEAVED, num_workers=workers)

    # ---- bounds

    def _bound(self, cut: Cut) -> float:
        """Of the step of all plans of this cut."""
        stages = [self._stage_options(cut, stage) for stage in range(cut.num_stages)]
        return _least_step_s(
            cut,
            [
                (
                    min(o.busy_s for o in options),
                    min(o.own_s for o in options),
                    min(o.forward_s for o in options),
                )
                for options in stages
            ],
        )

    def _layers_s(self, count: int, first: int, stop: int, submesh: Submesh) -> float:
        """What a stage takes at least, on the best view, with one microbatch in flight."""
        key = count, first, stop, submesh
        if key not in self._least_s:
            views = self.space.views[submesh]
            self._least_s[key] = min(
                self._search.least_seconds(view, count, first, stop, 1) * count for view in views
            )
        return self._least_s[key]

    # ---- options

    def _stage_options(self, cut: Cut, stage: int) -> tuple[_Option, ...]:
        first, stop = self._layers(cut, stage)
        submesh, flight = cut.submeshes[stage], cut.in_flight(stage)
        key = cut.num_microbatches, first, stop, flight, cut.stages_per_worker, submesh
        if key not in self._options:
            policies = self.space.policies if cut.num_workers is None else self.space.policies[:1]
            count = cut.num_microbatches
            self._options[key] = tuple(
                _Option(
                    view,
                    policy,
                    count * self._search.least_seconds(view, count, first, stop, flight),
                )
                for view in self.space.views[submesh]
                for policy in policies
            )
        return self._options[key]

    def _layers(self, cut: Cut, stage: int) -> tuple[int, int]:
        bounds = (*cut.first_layers, self._search.num_layers)
        return bounds[stage], bounds[stage + 1]

    def _played(self, cut: Cut, options: Sequence[_Option]) -> Candidate | None:
        """Simulated, its stages solved as far as the plan may be the best."""
        while True:
            known = [(o.busy_s, o.own_s, o.forward_s) for o in options]
            if _least_step_s(cut, known) >= self._step_s * _WORTH:
                return None
            left = [s for s, option in enumerate(options) if option.solved is None]
            if not left:
                break
            stage = max(left, key=lambda s: options[s].busy_s)
            try:
                self._solve(cut, stage, options[stage])
            except (NoFeasiblePlan, OptionError):
                options[stage].busy_s = math.inf
        graphs, solutions = zip(*(o.solved for o in options if o.solved), strict=True)
        try:
            transfers = stage_transfers(graphs, solutions)
            return best_schedule(self.space, cut, transfers, solutions)
        except NoFeasiblePlan:  # a schedule that holds too much
            return None

    def _solve(self, cut: Cut, stage: int, option: _Option) -> None:
        """One step towards the option's solution."""
        program, layers = self._program(cut.num_microbatches), self._layers(cut, stage)
        run = program.run(layers, option.policy)
        if option.fastest is None:
            found = option.fastest = self._exact.fastest(run, cut, stage, option.view)
            done = self._exact.fits(cut, found)
        elif option.rough is None:
            found = self._exact.within(run, cut, stage, option.view, _ROUGH_GAP)
            option.rough, done = found, found.gap <= TARGET_GAP
        else:
            found, done = self._exact.within(run, cut, stage, option.view), True
        p, count = found.prediction, cut.num_microbatches
        once_s = max(p.step_s, p.gather_s + p.reduce_s)
        busy_s = count * (p.forward_s + p.backward_s) + once_s
        if done:
            option.busy_s, option.own_s, option.forward_s = busy_s, busy_s - p.gather_s, p.forward_s
            option.solved = run.graph, found
        else:
            option.busy_s = max(option.busy_s, busy_s - count * (found.seconds - found.bound))


def _least_step_s(cut: Cut, stages: Sequence[tuple[float, float, float]]) -> float:
    """The bound of the module docstring. stages: busy_s, own_s and forward_s of each."""
    workers = cut.num_workers or cut.num_stages
    start_s = least_s = 0.0
    for worker in range(workers):
        own = stages[worker::workers]
        busy_s = math.fsum(busy for busy, _, _ in own)
        least_s = max(least_s, busy_s, start_s + math.fsum(s for _, s, _ in own))
        start_s += stages[worker][2]
    return least_s
