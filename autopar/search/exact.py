"""A cut, solved whole: every stage's integer program under the budget, and the step simulated.

Layers recompute as the tables' mixture says: of each class as many as it takes to fit. Where the
whole stage does not fit after all, more of them do; where it leaves room, fewer. Equal layers are
folded, and equal stages are written and solved once (`search.window`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from autopar.candidate import Candidate, Cut, stage_transfers
from autopar.errors import InternalError, NoFeasiblePlan, OptionError
from autopar.estimate import MeshCosts
from autopar.graph.program import Graph, Ref
from autopar.graph.repeat import whole_graph
from autopar.intraop.build import Fold, StageContext
from autopar.intraop.compose import Frontier, smallest_points, stage_mixture
from autopar.intraop.fold import NotFoldable
from autopar.intraop.stage import StageSolution
from autopar.layout import Dims
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import cut_stages, parameter_owners
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from autopar.search.clock import Clock
from autopar.search.prices import Level, Prices
from autopar.search.program import Program
from autopar.search.schedules import best_schedule
from autopar.search.space import Space
from autopar.search.stages import ANYTHING, StageSolver, ToldStage, Wanted
from autopar.search.window import Window, write_window
from autopar.sharding.registry import RuleTable

_LOG = logging.getLogger(__name__)
_MORE = 0.25  # of the layers of a stage: how many more recompute where it did not fit
_ALL = 2.0  # as many as can, as much as they can: where time is running out
_ATTEMPTS = 4
_LESS = (1.0, 0.5)  # of the layers of a stage: how many fewer recompute where there may be room
_WAITS = 1.01  # what a stage receives may come while it works: a step is not longer by that
_MANY_STAGES = 2  # with more, those with nearly the same microbatches in flight are solved alike
_ROOM = 0.98  # of the budget: what the layers are mixed for, as a stage has more than its layers
MAX_SPLITS = 3  # of the folds of a stage
_NOTHING = 1e-9  # of a step: rounding is no gain
_CLOSE = 1.02  # a second view is solved if its table value is further below the first's solution


@dataclass(frozen=True, slots=True, eq=False)
class SolvedCut:
    """A candidate with what it takes to write its plan: window and prepared stages. alike: as in
    `ExactSolver`."""

    candidate: Candidate
    window: Window
    policies: tuple[Remat, ...]  # of each layer of the model
    prepared: tuple[PreparedStage, ...]  # the written stages
    alike: bool

    def written_stage(self, number: int) -> StageSolution:
        return self.candidate.stages[self.window.stage_of.index(number)]


class _StageTooLarge(Exception):
    """Stages that do not fit as their layers recompute now. reason: of the first."""

    def __init__(self, stages: tuple[int, ...], reason: NoFeasiblePlan) -> None:
        super().__init__(str(reason))
        self.stages, self.reason = stages, reason


class Run(NamedTuple):
    """Consecutive layers as a stage. owned: canonical names of the parameters that it keeps."""

    graph: Graph
    prepared: PreparedStage
    owned: frozenset[str]


class ExactSolver:
    """Solves cuts; remembers the stages that it has solved.

    alike: equal layers are folded, and stages with nearly the same microbatches in flight have room
    for the same number, so that fewer and smaller programs are solved. False where every stage is
    to be solved as it is. target_gap: of a stage.
    """

    def __init__(
        self,
        space: Space,
        prices: Prices,
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        clock: Clock,
        *,
        alike: bool,
        target_gap: float,
    ) -> None:
        self.space, self.prices, self.clock, self.alike = space, prices, clock, alike
        self.stages = StageSolver(space.options, mesh_costs, clock, target_gap)
        self._fold = alike
        self._runs: dict[tuple[int, tuple[int, int], Remat], Run] = {}
        self._recomputed: dict[tuple[int, Remat], tuple[Graph, Mapping[Ref, Dims]]] = {}

    def solve(self, program: Program, cut: Cut) -> SolvedCut:
        """NoFeasiblePlan where some stage fits under no mixture of the policies. An interleaved cut
        is an alternative to a plain one: it gets one attempt, and its stages fit with their fastest
        solutions or not at all."""
        extra = [0.0] * cut.num_stages
        solved = self._fitting(program, cut, extra)
        if cut.num_workers is None and len(self.space.policies) > 1 and not self.clock.late:
            solved = self._taken_back(program, cut, extra, solved)
        return solved

    def told(self, program: Program, cut: Cut, policies: tuple[Remat, ...]) -> SolvedCut:
        """The cut with so told a policy for each layer. NoFeasiblePlan where a stage does not
        fit."""
        window = self._window(program, cut, policies)
        try:
            return self._solve_window(program, cut, window, policies)
        except _StageTooLarge as error:
            raise error.reason from None

    def proved(self, program: Program, solved: SolvedCut) -> SolvedCut:
        """The same cut on the same views, or a faster plan of it: its folds are split where the
        layers would better not all be alike, and stages above the target gap solved with a MIP."""
        cut = solved.candidate.cut
        views = tuple(((0.0, stage.mesh),) for stage in solved.candidate.stages)
        cut = replace(cut, views=views)
        best = self._split(program, cut, solved)
        if all(s.gap <= self.space.options.target_gap for s in best.candidate.stages):
            return best
        try:
            found = self._solve_window(
                program, cut, best.window, best.policies, Wanted(proven=True)
            )
        except _StageTooLarge:
            return best
        return min(found, best, key=lambda s: s.candidate.step_s)

    def _split(self, program: Program, cut: Cut, solved: SolvedCut) -> SolvedCut:
        """With folds split as long as that is faster."""
        breaks: set[int] = set()
        for _ in range(MAX_SPLITS):
            splits = [solved.written_stage(i).split for i in range(len(solved.prepared))]
            more = {solved.window.break_of(i, s) for i, s in enumerate(splits) if s is not None}
            if not more or self.clock.expired:
                break
            breaks |= more
            window = self._window(program, cut, solved.policies, breaks)
            try:
                found = self._solve_window(program, cut, window, solved.policies)
            except (NotFoldable, _StageTooLarge) as error:
                _LOG.info("not split before layers %s: %s", sorted(more), error)
                break
            if found.candidate.step_s >= solved.candidate.step_s * (1 - _NOTHING):
                break
            solved = found
        return solved

    # ---- told stages, every layer written

    def run(self, program: Program, layers: tuple[int, int], policy: Remat) -> Run:
        """The layers first .. stop - 1 under a policy."""
        count = program.num_microbatches
        if (count, layers, policy) not in self._runs:
            if (count, policy) not in self._recomputed:
                graph = apply_recompute(whole_graph(program.folded), policy)
                self._recomputed[count, policy] = graph, RuleTable(graph).dims
            graph, dims = self._recomputed[count, policy]
            first_layers = sorted({0, *layers} - {program.num_layers})
            graphs = cut_stages(graph, first_layers)
            index = first_layers.index(layers[0])
            owned = frozenset(o for o, s in parameter_owners(graphs).items() if s == index)
            prepared = prepare_stage(graphs[index], dims)
            self._runs[count, layers, policy] = Run(graphs[index], prepared, owned)
        return self._runs[count, layers, policy]

    def fastest(self, run: Run, cut: Cut, stage: int, view: LogicalMesh) -> StageSolution:
        """Whatever its bytes. OptionError for a pin that the view cannot honour."""
        return self.stages.free(run.prepared, view, self._context(cut, stage, run.owned, ()))

    def within(
        self, run: Run, cut: Cut, stage: int, view: LogicalMesh, target_gap: float | None = None
    ) -> StageSolution:
        """NoFeasiblePlan where nothing fits the budget. target_gap: another than the solver's."""
        context, budget = self._context(cut, stage, run.owned, ()), self._budget(cut, view)
        return self.stages.within(run.prepared, view, context, budget, target_gap=target_gap)

    def fits(self, cut: Cut, solution: StageSolution) -> bool:
        """Stages that take turns are held against the budget together, once they are simulated,
        unless stages are to be alike."""
        if cut.num_workers is not None and not self.alike:
            return True
        return solution.prediction.peak_bytes <= self._budget(cut, solution.mesh)

    # ---- whole cuts

    def _fitting(self, program: Program, cut: Cut, extra: list[float]) -> SolvedCut:
        """The first attempt that fits. extra: grows for the stages that are too large."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._attempt(program, cut, extra)
            except _StageTooLarge as error:
                last = attempt == _ATTEMPTS - 1 or len(self.space.policies) == 1
                if last or cut.num_workers is not None or extra[error.stages[0]] >= 1:
                    raise error.reason from None
                for stage in error.stages:
                    extra[stage] += _ALL if self.clock.late else _MORE * 2**attempt
        raise InternalError("the last attempt either returns or raises")

    def _taken_back(
        self, program: Program, cut: Cut, extra: list[float], solved: SolvedCut
    ) -> SolvedCut:
        """With fewer layers that recompute, where that fits too and is faster: layers alone need
        more than a whole stage. Each stage goes as far as it can, all of them at a time."""
        worth_s = _WAITS * solved.candidate.step_s / cut.num_microbatches
        open_ = {
            index
            for index, written in enumerate(solved.window.stage_of)
            if any(p.remat is not self.space.policies[0] for p in solved.window.pieces[written])
        }
        fewer = list(extra)
        for less in (*_LESS, 0.0):
            if not open_ or self.clock.late:
                break
            trial = [extra[i] - less if i in open_ else e for i, e in enumerate(fewer)]
            if self._policies(program, cut, trial) == solved.policies:
                break
            try:
                found = self._attempt(program, cut, trial, Wanted(worth_s=worth_s))
            except _StageTooLarge as error:
                taken = open_ - set(error.stages)
                fewer = [trial[i] if i in taken else e for i, e in enumerate(fewer)]
                open_ -= taken
                continue
            if found.candidate.step_s < solved.candidate.step_s:
                solved = found
            break
        return solved

    def _attempt(
        self, program: Program, cut: Cut, extra: Sequence[float], wanted: Wanted = ANYTHING
    ) -> SolvedCut:
        policies = self._policies(program, cut, extra)
        window = self._window(program, cut, policies)
        try:
            return self._solve_window(program, cut, window, policies, wanted)
        except NotFoldable as error:  # equal layers that are not alike in this stage
            _LOG.info("every layer is written: %s", error)
            self._fold = False
        window = self._window(program, cut, policies)
        return self._solve_window(program, cut, window, policies, wanted)

    def _window(
        self,
        program: Program,
        cut: Cut,
        policies: tuple[Remat, ...],
        breaks: Collection[int] = (),
    ) -> Window:
        """Stages are equal that have equal layers, policies, best view and room. breaks: as of
        `write_window`."""
        bounds = itertools.pairwise([*cut.first_layers, program.num_layers])
        stages = [
            (
                program.kind_of_layer[start:stop].tobytes(),
                policies[start:stop],
                cut.views[index][0][1],
                self._flight(cut, index),
            )
            for index, (start, stop) in enumerate(bounds)
        ]
        return write_window(
            program.folded,
            program.kind_of_written,
            cut.first_layers,
            policies,
            fold=self._fold,
            stages=stages if self._fold else None,
            breaks=breaks,
        )

    # ---- recomputation

    def _policies(self, program: Program, cut: Cut, extra: Sequence[float]) -> tuple[Remat, ...]:
        """Of each layer of the model. extra: share of a stage's layers that recompute more than the
        tables say."""
        bounds = [*cut.first_layers, program.num_layers]
        policies: list[Remat] = []
        for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
            policies += self._stage_policies(program, cut, stage, start, stop, extra[stage])
        return tuple(policies)

    def _stage_policies(
        self, program: Program, cut: Cut, stage: int, start: int, stop: int, extra: float
    ) -> list[Remat]:
        """More of the stage's first layers recompute, and more of them the smaller the budget."""
        kinds = program.kind_of_layer[start:stop]
        least = self.space.policies[0]
        view, count = cut.views[stage][0][1], cut.num_microbatches
        if self.prices.level(view, count) < Level.FULL:
            return [least] * len(kinds)
        counts = np.bincount(kinds, minlength=len(program.classes))
        flight = self._flight(cut, stage)
        frontiers = self.prices.frontiers(view, count)
        budget = self._budget(cut, view)
        mixture = stage_mixture(frontiers, counts, flight, _ROOM * budget)
        if mixture is None:
            mixture = stage_mixture(frontiers, counts, flight, math.inf)
            assert mixture is not None
        share = mixture.share
        fast, small = mixture.fast, mixture.small
        if extra < 0:
            share = max(0.0, share + extra)
            fast = fast if share or extra > -1 else self._least_recomputing(frontiers)
        elif extra > 0:
            smallest = smallest_points(frontiers, counts, flight)
            if share + extra > 1:
                fast, small, share = small, smallest, share + extra - 1
            else:
                share += extra
        chosen = []
        seen = [0] * len(program.classes)
        for kind in kinds:
            some = math.ceil(min(1.0, share) * counts[kind] - 1e-9)
            chosen.append((small if seen[kind] < some else fast)[kind].remat)
            seen[kind] += 1
        return chosen

    def _least_recomputing(self, frontiers: Sequence[Frontier]) -> Frontier:
        """Of each class a point under the policy that recomputes least."""
        least = self.space.policies[0]
        return tuple(next((p for p in f if p.remat is least), f[0]) for f in frontiers)

    def _flight(self, cut: Cut, stage: int) -> int:
        """Microbatches in flight that the stage has room for: rounded up where there are many
        stages, so that they are alike."""
        flight = cut.in_flight(stage)
        if not self.alike or cut.num_stages <= _MANY_STAGES or cut.num_workers is not None:
            return flight
        return min(cut.in_flight(0), 1 << (flight - 1).bit_length())

    def _budget(self, cut: Cut, view: LogicalMesh) -> float:
        """Bytes per device of one stage: those of one worker share."""
        return self.space.budget_of(view) / cut.stages_per_worker

    # ---- stages

    def _solve_window(
        self,
        program: Program,
        cut: Cut,
        window: Window,
        policies: tuple[Remat, ...],
        wanted: Wanted = ANYTHING,
    ) -> SolvedCut:
        label = f"{len(cut.first_layers)} stage(s), {cut.num_microbatches} microbatch(es)"
        with self.clock.passes("exact stages", label):
            recomputed = apply_recompute(window.graph, window.policies)
            dims = RuleTable(recomputed).dims
            graphs = cut_stages(recomputed, window.first_layers)
            owners = parameter_owners(graphs)
            prepared = tuple(prepare_stage(graph, dims) for graph in graphs)
            contexts = []
            for written_index in range(len(prepared)):
                owned = frozenset(o for o, holder in owners.items() if holder == written_index)
                index = window.stage_of.index(written_index)
                contexts.append(self._context(cut, index, owned, window.folds(written_index)))
            if cut.num_workers is None:
                self._ahead(prepared, cut, window, contexts, wanted)
            written = []
            too_large: list[int] = []
            reason: NoFeasiblePlan | None = None
            for index, stage in enumerate(prepared):
                views = cut.views[window.stage_of.index(index)]
                try:
                    written.append(self._solve_stage(stage, cut, views, contexts[index], wanted))
                except NoFeasiblePlan as error:
                    alike = window.stands_for(index)
                    too_large += alike
                    reason = reason or NoFeasiblePlan(
                        f"stage {alike[0]} of {cut.num_stages}: {error}",
                        least_bytes=error.least_bytes,
                    )
                    if self.clock.late:
                        break
            if reason is not None:
                raise _StageTooLarge(tuple(too_large), reason)
            stages = tuple(
                _with_flight(written[number], cut.in_flight(index))
                for index, number in enumerate(window.stage_of)
            )
        with self.clock.passes("simulate", label):
            transfers = window.all_transfers(stage_transfers(graphs, written))
            candidate = best_schedule(self.space, cut, transfers, stages)
        return SolvedCut(candidate, window, policies, prepared, self.alike)

    def _ahead(
        self,
        prepared: Sequence[PreparedStage],
        cut: Cut,
        window: Window,
        contexts: Sequence[StageContext],
        wanted: Wanted,
    ) -> None:
        """All written stages on all their views, several at a time."""
        told = [
            ToldStage(stage, view, contexts[index], self._budget(cut, view), wanted)
            for index, stage in enumerate(prepared)
            for _, view in cut.views[window.stage_of.index(index)]
        ]
        self.stages.ahead(told)

    def _solve_stage(
        self,
        stage: PreparedStage,
        cut: Cut,
        views: Sequence[tuple[float, LogicalMesh]],
        context: StageContext,
        wanted: Wanted,
    ) -> StageSolution:
        """A written stage, on the best of the views that the tables put first."""
        best: StageSolution | None = None
        failures: list[NoFeasiblePlan] = []
        refused: list[OptionError] = []
        for least, view in views:
            if best is not None and best.seconds <= _CLOSE * least:
                break
            try:
                found = self._on_view(stage, view, context, cut, wanted)
            except NoFeasiblePlan as error:
                failures.append(error)
                continue
            except OptionError as error:  # a pin that this view cannot honour
                refused.append(error)
                continue
            if best is None or found.seconds < best.seconds:
                best = found
        if best is None:
            raise failures[0] if failures else refused[0]
        return best

    def _context(
        self, cut: Cut, stage: int, owned: frozenset[str], folds: tuple[Fold, ...]
    ) -> StageContext:
        return StageContext(
            cut.num_microbatches,
            self._flight(cut, stage),
            owned,
            self.space.options.placements,
            folds=folds,
            offload=bool(self.space.options.offload),
        )

    def _on_view(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        cut: Cut,
        wanted: Wanted,
    ) -> StageSolution:
        if cut.num_workers is None:
            budget = self._budget(cut, view)
            return self.stages.within(stage, view, context, budget, wanted)
        free = self.stages.free(stage, view, context, proven=wanted.proven)
        if not self.fits(cut, free):
            raise NoFeasiblePlan(
                "its fastest solution does not fit its share of the worker's memory"
            )
        return free


def _with_flight(stage: StageSolution, in_flight: int) -> StageSolution:
    return replace(stage, prediction=replace(stage.prediction, in_flight=in_flight))
