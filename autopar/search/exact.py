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
from dataclasses import replace

from autopar.candidate import Cut, stage_transfers
from autopar.errors import InternalError, NoFeasiblePlan, OptionError
from autopar.estimate import MeshCosts
from autopar.intraop.fold import NotFoldable
from autopar.intraop.solver import NotWorth
from autopar.intraop.stage import StageSolution
from autopar.intraop.stage_problem import Fold, StageContext
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.stages import cut_stages, parameter_owners
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from autopar.search.clock import Clock
from autopar.search.mixture import stage_policies
from autopar.search.prices import Level, Prices
from autopar.search.program import Program, Run
from autopar.search.schedules import HoldsTooMuch, best_schedule, room_for_faster
from autopar.search.solved import LESS, Race, SlowerCut, SolvedCut, Tries, UnsolvedStages
from autopar.search.space import Space
from autopar.search.stages import (
    ANYTHING,
    StageSolver,
    ToldStage,
    TooBusy,
    Wanted,
    busy_seconds,
)
from autopar.search.window import Window, write_window
from autopar.sharding.registry import RuleTable

_LOG = logging.getLogger(__name__)
_MORE = 0.25  # of the layers of a stage: how many more recompute where it did not fit
_ALL = 2.0  # as many as can, as much as they can: where time is running out
_ATTEMPTS = 4
_WAITS = 1.01  # what a stage receives may come while it works: a step is not longer by that
_MANY_STAGES = 2  # with more, those with nearly the same microbatches in flight are solved alike
_ROOMIER = 2  # attempts at room for a faster schedule: the second for one microbatch more
MAX_SPLITS = 3  # of the folds of a stage
_NOTHING = 1e-9  # of a step: rounding is no gain
_CLOSE = 1.02  # a second view is solved if its table value is further below the first's solution


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

    def solve(self, program: Program, cut: Cut, *, known_s: float = math.inf) -> SolvedCut:
        """NoFeasiblePlan where some stage fits under no mixture of the policies. An interleaved cut
        is an alternative to a plain one: it gets one attempt, and its stages fit with their fastest
        solutions or not at all. known_s: of another cut's step; SlowerCut where this one is seen to
        be slower, if that is before it is solved. Where a faster schedule holds too much, and
        promises a step below known_s, stages are solved again with room for it; not where layers
        recompute, which leaves less to be saved but not less for W."""
        found: list[SolvedCut] = []
        failure: NoFeasiblePlan | SlowerCut | None = None
        for attempt in range(1 + (_ROOMIER if cut.num_workers is None else 0)):
            try:
                found.append(self._solved(program, cut, known_s))
                recomputes = set(found[-1].policies) != {self.space.policies[0]}
                solved = found[-1].candidate
                room = 0 if recomputes else room_for_faster(self.space, solved, known_s)
            except HoldsTooMuch as error:
                room, failure = error.room, error
            except (NoFeasiblePlan, SlowerCut) as error:
                failure = failure or error
                break
            more = room - cut.room
            if more <= 0 or (attempt and more > 1) or self.clock.late:
                break
            cut = replace(cut, room=room)
        if failure is not None and not found:
            raise failure
        return min(found, key=lambda s: s.candidate.step_s)

    def _solved(self, program: Program, cut: Cut, known_s: float) -> SolvedCut:
        """With as much room as the cut asks for."""
        tries = Tries(cut.num_stages, known_s)
        extra = [0.0] * cut.num_stages
        solved = self._fitting(program, cut, extra, tries)
        if cut.num_workers is None and len(self.space.policies) > 1 and not self.clock.late:
            solved = self._taken_back(program, cut, extra, solved, tries)
        return solved

    def told(self, program: Program, cut: Cut, policies: tuple[Remat, ...]) -> SolvedCut:
        """The cut with so told a policy for each layer. NoFeasiblePlan where a stage does not
        fit."""
        window = self._window(program, cut, policies)
        try:
            return self._solve_window(program, cut, window, policies)
        except UnsolvedStages as error:
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
        except (UnsolvedStages, HoldsTooMuch):
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
            except (NotFoldable, UnsolvedStages, HoldsTooMuch) as error:
                _LOG.info("not split before layers %s: %s", sorted(more), error)
                break
            if found.candidate.step_s >= solved.candidate.step_s * (1 - _NOTHING):
                break
            solved = found
        return solved

    # ---- told stages, every layer written

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

    def _fitting(self, program: Program, cut: Cut, extra: list[float], tries: Tries) -> SolvedCut:
        """The first attempt that fits. extra: grows for the stages that are too large."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._attempt(program, cut, extra, tries)
            except UnsolvedStages as error:
                last = attempt == _ATTEMPTS - 1 or len(self.space.policies) == 1
                if last or cut.num_workers is not None or extra[error.stages[0]] >= 1:
                    raise error.reason from None
                for stage in error.stages:
                    extra[stage] += _ALL if self.clock.late else _MORE * 2**attempt
        raise InternalError("the last attempt either returns or raises")

    def _taken_back(
        self,
        program: Program,
        cut: Cut,
        extra: Sequence[float],
        solved: SolvedCut,
        tries: Tries,
    ) -> SolvedCut:
        """With fewer layers that recompute, where that fits too and is faster: layers alone need
        more than a whole stage. Each stage goes as far as it can, all of them at a time."""
        fewer = list(extra)
        waits = _WAITS if cut.num_stages > 1 else 1.0
        least_s = min(solved.candidate.step_s, tries.known_s)
        worth_s = waits * least_s / cut.num_microbatches
        open_ = {
            index
            for index, written in enumerate(solved.window.stage_of)
            if any(p.remat is not self.space.policies[0] for p in solved.window.pieces[written])
        } - set(tries.final(extra))
        closed = set(range(cut.num_stages)) - open_
        stages = solved.candidate.stages
        count = cut.num_microbatches
        if any(busy_seconds(stages[i], count) >= tries.known_s for i in closed):
            return solved
        for less in (*LESS, 0.0):
            if not open_ or self.clock.late:
                break
            back = {i for i in open_ if tries.may_help(i, fewer[i] - less)}
            trial = [e - less if i in back else e for i, e in enumerate(fewer)]
            try:
                found = self._attempt(program, cut, trial, tries, Wanted(worth_s=worth_s))
            except HoldsTooMuch:
                break
            except UnsolvedStages as error:
                back -= set(error.stages)
            else:
                solved = min(solved, found, key=lambda s: s.candidate.step_s)
            fewer = [trial[i] if i in back else e for i, e in enumerate(fewer)]
            open_ -= back
        return solved

    def _attempt(
        self,
        program: Program,
        cut: Cut,
        extra: Sequence[float],
        tries: Tries,
        wanted: Wanted = ANYTHING,
    ) -> SolvedCut:
        policies = self._policies(program, cut, extra)
        if policies not in tries.known:
            race = tries.race(extra)
            try:
                tries.known[policies] = self._under(program, cut, policies, wanted, race)
            except UnsolvedStages as error:
                tries.known[policies] = error
        found = tries.known[policies]
        if isinstance(found, SolvedCut):
            return found
        tries.failed(found, extra)
        raise found

    def _under(
        self,
        program: Program,
        cut: Cut,
        policies: tuple[Remat, ...],
        wanted: Wanted,
        race: Race | None,
    ) -> SolvedCut:
        def solved() -> SolvedCut:
            window = self._window(program, cut, policies)
            return self._solve_window(program, cut, window, policies, wanted, race)

        try:
            return solved()
        except NotFoldable as error:  # equal layers that are not alike in this stage
            _LOG.info("every layer is written: %s", error)
            self._fold = False
        return solved()

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
        least, count = self.space.policies[0], cut.num_microbatches
        policies: list[Remat] = []
        for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
            view = cut.views[stage][0][1]
            if self.prices.level(view, count) < Level.FULL:
                policies += [least] * (stop - start)
            else:
                policies += stage_policies(
                    self.prices.frontiers(view, count),
                    program.kind_of_layer[start:stop].tolist(),
                    self._flight(cut, stage),
                    self._budget(cut, view),
                    extra=extra[stage],
                    least=least,
                )
        return tuple(policies)

    def _flight(self, cut: Cut, stage: int) -> int:
        """Microbatches in flight that the stage has room for: rounded up where there are many
        stages, so that they are alike."""
        flight = cut.in_flight(stage)
        if self.alike and cut.num_stages > _MANY_STAGES and cut.num_workers is None:
            flight = min(cut.in_flight(0), 1 << (flight - 1).bit_length())
        return max(flight, cut.room)

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
        race: Race | None = None,
    ) -> SolvedCut:
        label = f"{len(cut.first_layers)} stage(s), {cut.num_microbatches} microbatch(es)"
        with self.clock.passes("exact stages", label):
            recomputed = program.recomputed(window.graph, window.policies)
            dims = RuleTable(recomputed, known=program.rules).dims
            graphs = cut_stages(recomputed, window.first_layers)
            owners = parameter_owners(graphs)
            prepared = tuple(prepare_stage(graph, dims, program.rules) for graph in graphs)
            contexts = []
            for written_index in range(len(prepared)):
                owned = frozenset(o for o, holder in owners.items() if holder == written_index)
                index = window.stage_of.index(written_index)
                contexts.append(self._context(cut, index, owned, window.folds(written_index)))
            asked = [_asked(wanted, race, window.stands_for(i)) for i in range(len(prepared))]
            chosen = self._solve_stages(prepared, cut, window, contexts, asked)
            stages = tuple(
                _with_flight(chosen[number], cut.in_flight(index))
                for index, number in enumerate(window.stage_of)
            )
        with self.clock.passes("simulate", label):
            transfers = window.all_transfers(stage_transfers(graphs, chosen))
            candidate = best_schedule(self.space, cut, transfers, stages)
        return SolvedCut(candidate, window, policies, prepared, self.alike)

    def _solve_stages(
        self,
        prepared: Sequence[PreparedStage],
        cut: Cut,
        window: Window,
        contexts: Sequence[StageContext],
        asked: Sequence[Wanted],
    ) -> list[StageSolution]:
        """The written stages, several at a time: each on the view that the tables put first, then
        on the next one where that may be better. SlowerCut where one is too busy on all of its
        views, UnsolvedStages where some fit on none."""
        views = [cut.views[window.stage_of.index(i)] for i in range(len(prepared))]
        best: dict[int, StageSolution] = {}
        failures: list[list[NoFeasiblePlan]] = [[] for _ in prepared]
        refused: list[OptionError] = []
        unsolved: dict[int, NoFeasiblePlan] = {}
        open_ = sorted(range(len(prepared)), key=lambda i: asked[i].race_s)  # one may end the cut
        for number in range(max(map(len, views))):
            open_ = [i for i in open_ if number < len(views[i])]
            open_ = [
                i for i in open_ if i not in best or best[i].seconds > _CLOSE * views[i][number][0]
            ]
            last = [i not in best and number == len(views[i]) - 1 for i in open_]
            on = [views[i][number][1] for i in open_]
            if cut.num_workers is None:
                told = [
                    ToldStage(prepared[i], v, contexts[i], self._budget(cut, v), asked[i], end)
                    for i, v, end in zip(open_, on, last, strict=True)
                ]
                self.stages.ahead(told)
            for i, view, end in zip(open_, on, last, strict=True):
                try:
                    found = self._on_view(prepared[i], view, contexts[i], cut, asked[i])
                except NoFeasiblePlan as error:
                    failures[i].append(error)
                except OptionError as error:  # a pin that this view cannot honour
                    refused.append(error)
                else:
                    best[i] = min(best.get(i, found), found, key=lambda s: s.seconds)
                    continue
                if not end:
                    continue
                if not failures[i]:
                    raise refused[0]
                if all(isinstance(f, TooBusy) for f in failures[i]):
                    raise SlowerCut(str(failures[i][0]))
                unsolved[i] = failures[i][0]
                if self.clock.late:
                    raise _unsolved(window, unsolved)
        if unsolved:
            raise _unsolved(window, unsolved)
        return [best[i] for i in range(len(prepared))]

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
            compiled=bool(self.space.options.compiled),
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


def _unsolved(window: Window, errors: Mapping[int, NoFeasiblePlan]) -> UnsolvedStages:
    """errors: by written stage."""
    too_large: list[int] = []
    too_slow: list[int] = []
    for index, error in errors.items():
        (too_slow if isinstance(error, NotWorth) else too_large).extend(window.stands_for(index))
    written = min(errors)
    text = f"stage {window.stands_for(written)[0]} of {len(window.stage_of)}: {errors[written]}"
    reason = NoFeasiblePlan(text, least_bytes=errors[written].least_bytes)
    return UnsolvedStages(too_large, too_slow, reason)


def _asked(wanted: Wanted, race: Race | None, stages: Collection[int]) -> Wanted:
    """Of a written stage that stands for these of the model."""
    if race is None or race.final.isdisjoint(stages):
        return wanted
    return wanted._replace(race_s=_CLOSE * race.known_s)


def _with_flight(stage: StageSolution, in_flight: int) -> StageSolution:
    return replace(stage, prediction=replace(stage.prediction, in_flight=in_flight))
