"""A cut, solved whole: every stage's integer program under the budget, and the step simulated.

Layers recompute as the tables' mixture says: of each class as many as it takes to fit. Where the
whole stage does not fit after all, more of them do; where it leaves room, fewer. Equal layers are
folded, and equal stages are written and solved once (`search.window`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.candidate import Candidate, Cut, stage_transfers
from autopar.errors import InternalError, NoFeasiblePlan, OptionError
from autopar.estimate import MeshCosts
from autopar.graph.program import Graph
from autopar.intraop.build import StageContext
from autopar.intraop.compose import Frontier, smallest_points, stage_mixture
from autopar.intraop.fold import NotFoldable
from autopar.intraop.stage import SolverOptions, StageSolution, solve_stage
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import cut_stages, parameter_owners
from autopar.mesh import LogicalMesh
from autopar.pace import Pace, pace
from autopar.plan import Remat
from autopar.schedule import ScheduleKind
from autopar.search.clock import Clock
from autopar.search.prices import Level, Prices
from autopar.search.program import Program
from autopar.search.space import Space
from autopar.search.unfold import renamed, same_structure
from autopar.search.window import Window, write_window
from autopar.sharding.registry import RuleTable
from autopar.simulate import StageCost, Transfer

_LOG = logging.getLogger(__name__)
_MORE = 0.25  # of the layers of a stage: how many more recompute where it did not fit
_ALL = 2.0  # as many as can, as much as they can: where time is running out
_ATTEMPTS = 4
_STAGE_SHARE = 0.5  # of the time left: what one stage may take, so that the others get some
_LESS = (1.0, 0.5)  # of the layers of a stage: how many fewer recompute where there may be room
_SMALL_GRAPH = 1500  # operators
_MANY_STAGES = 2  # with more, those with nearly the same microbatches in flight are solved alike
_ROOM = 0.98  # of the budget: what the layers are mixed for, as a stage has more than its layers
_CLOSE = 1.02  # a second view is solved if its table value is further below the first's solution
_ROUNDING = 1 + 1e-6
_MANY_CELLS = 20_000  # of a schedule: stages x microbatches
_FEW = 128  # microbatches: so many more than fill and drain a pipeline show its pace
_PROOF_SHARE = 0.25  # of the time left: what proving one stage of the winner may take


@dataclass(frozen=True, slots=True, eq=False)
class SolvedCut:
    """A candidate with what it takes to write its plan: window and prepared stages."""

    candidate: Candidate
    window: Window
    policies: tuple[Remat, ...]  # of each layer of the model
    prepared: tuple[PreparedStage, ...]  # the written stages


class _StageTooLarge(Exception):
    """A stage, and those equal to it, that does not fit as its layers recompute now."""

    def __init__(self, stages: tuple[int, ...], reason: NoFeasiblePlan) -> None:
        super().__init__(str(reason))
        self.stages, self.reason = stages, reason


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A solved stage graph; solution: None where nothing fits."""

    graph: Graph
    solution: StageSolution | None
    reason: NoFeasiblePlan | None = None


class ExactSolver:
    """Solves cuts; remembers the stages that it has solved."""

    def __init__(
        self,
        space: Space,
        prices: Prices,
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        clock: Clock,
    ) -> None:
        self.space, self.prices, self.mesh_costs, self.clock = space, prices, mesh_costs, clock
        self._known: dict[object, _Known] = {}
        self._fold = True

    def solve(self, program: Program, cut: Cut, *, proven: bool = False) -> SolvedCut:
        """NoFeasiblePlan where some stage fits under no mixture of the policies. An interleaved cut
        is an alternative to a plain one: it gets one attempt, and its stages fit with their fastest
        solutions or not at all."""
        extra = [0.0] * cut.num_stages
        solved = self._fitting(program, cut, extra, proven)
        if cut.num_workers is None and len(self.space.policies) > 1 and not self.clock.late:
            solved = self._taken_back(program, cut, extra, solved, proven)
        return solved

    def _fitting(self, program: Program, cut: Cut, extra: list[float], proven: bool) -> SolvedCut:
        """The first attempt that fits. extra: grows for the stages that are too large."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._attempt(program, cut, extra, proven)
            except _StageTooLarge as error:
                last = attempt == _ATTEMPTS - 1 or len(self.space.policies) == 1
                if last or cut.num_workers is not None or extra[error.stages[0]] >= 1:
                    raise error.reason from None
                for stage in error.stages:
                    extra[stage] += _ALL if self.clock.late else _MORE * 2**attempt
        raise InternalError("the last attempt either returns or raises")

    def _taken_back(
        self, program: Program, cut: Cut, extra: list[float], solved: SolvedCut, proven: bool
    ) -> SolvedCut:
        """With fewer layers that recompute, where that fits too and is faster: layers alone need
        more than a whole stage. One attempt for large graphs, more for small ones."""
        small = len(solved.window.graph.operators) <= _SMALL_GRAPH
        for less in _LESS if small else _LESS[-1:]:
            window = solved.window
            stages = [
                index
                for index, written in enumerate(window.stage_of)
                if any(p.remat is not self.space.policies[0] for p in window.pieces[written])
            ]
            if not stages:
                break
            fewer = [e - less if i in stages else e for i, e in enumerate(extra)]
            for _ in stages:
                try:
                    found = self._attempt(program, cut, fewer, proven)
                except _StageTooLarge as error:
                    for stage in error.stages:
                        fewer[stage] = extra[stage]
                    continue
                if found.candidate.step_s < solved.candidate.step_s:
                    solved, extra = found, fewer
                break
        return solved

    def _attempt(
        self, program: Program, cut: Cut, extra: Sequence[float], proven: bool
    ) -> SolvedCut:
        policies = self._policies(program, cut, extra)
        try:
            return self._solve_window(
                program, cut, self._window(program, cut, policies), policies, proven
            )
        except NotFoldable as error:  # equal layers that are not alike in this stage
            _LOG.info("every layer is written: %s", error)
            self._fold = False
        return self._solve_window(
            program, cut, self._window(program, cut, policies), policies, proven
        )

    def _window(self, program: Program, cut: Cut, policies: tuple[Remat, ...]) -> Window:
        """Stages are equal that have equal layers, policies, best view and room."""
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
        if cut.num_stages <= _MANY_STAGES or cut.num_workers is not None:
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
        proven: bool,
    ) -> SolvedCut:
        label = f"{len(cut.first_layers)} stage(s), {cut.num_microbatches} microbatch(es)"
        with self.clock.passes("exact stages", label):
            recomputed = apply_recompute(window.graph, window.policies)
            dims = RuleTable(recomputed).dims
            graphs = cut_stages(recomputed, window.first_layers)
            owners = parameter_owners(graphs)
            prepared = tuple(prepare_stage(graph, dims) for graph in graphs)
            written = []
            for index, stage in enumerate(prepared):
                owned = frozenset(o for o, holder in owners.items() if holder == index)
                try:
                    written.append(self._solve_stage(stage, cut, window, index, owned, proven))
                except NoFeasiblePlan as error:
                    alike = window.stands_for(index)
                    reason = NoFeasiblePlan(
                        f"stage {alike[0]} of {cut.num_stages}: {error}",
                        least_bytes=error.least_bytes,
                    )
                    raise _StageTooLarge(alike, reason) from None
            stages = tuple(
                _with_flight(written[number], cut.in_flight(index))
                for index, number in enumerate(window.stage_of)
            )
        with self.clock.passes("simulate", label):
            transfers = _all_transfers(stage_transfers(graphs, written), window)
            candidate = best_schedule(self.space, cut, transfers, stages)
        return SolvedCut(candidate, window, policies, prepared)

    def _solve_stage(
        self,
        stage: PreparedStage,
        cut: Cut,
        window: Window,
        written: int,
        owned: frozenset[str],
        proven: bool,
    ) -> StageSolution:
        """A written stage, on the best of the views that the tables put first."""
        index = window.stage_of.index(written)
        context = StageContext(
            cut.num_microbatches,
            self._flight(cut, index),
            owned,
            self.space.options.placements,
            folds=window.folds(written),
            offload=bool(self.space.options.offload),
        )
        best: StageSolution | None = None
        failures: list[NoFeasiblePlan] = []
        refused: list[OptionError] = []
        for least, view in cut.views[index]:
            if best is not None and best.seconds <= _CLOSE * least:
                break
            try:
                found = self._on_view(stage, view, context, cut, proven)
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

    def _on_view(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        cut: Cut,
        proven: bool,
    ) -> StageSolution:
        budget = self._budget(cut, view)
        first = min((op.layer for op in stage.graph.operators), default=0)
        owned = [context.owned is None or i.owner in context.owned for i in stage.graph.inputs]
        pins = [(context.pins or {}).get(i.owner) for i in stage.graph.inputs]
        dims = [stage.table.dims[i.ref] for i in stage.graph.inputs]
        text = (
            f"{same_structure(stage.graph)}\n{owned}\n{pins}\n{dims}\n"
            f"{context.num_microbatches}\n"
            f"{[(f.layer - first, f.count) for f in context.folds]}\n{proven}"
        )
        free_key = (hashlib.sha256(text.encode()).hexdigest(), view)
        known = self._known.get(free_key)
        if known is None:
            free = self._solved(stage, view, context, None, proven)
            known = self._known[free_key] = _Known(stage.graph, free)
        assert known.solution is not None
        prediction = replace(known.solution.prediction, in_flight=context.in_flight)
        if prediction.peak_bytes <= budget:
            free = renamed(known.solution, known.graph, stage.graph)
            return replace(free, prediction=prediction)
        if cut.num_workers is not None:
            raise NoFeasiblePlan(
                "its fastest solution does not fit its share of the worker's memory"
            )
        tight_key = (*free_key, context.in_flight, budget)
        if tight_key not in self._known:
            try:
                found = self._solved(stage, view, context, budget, proven)
                self._known[tight_key] = _Known(stage.graph, found)
            except NoFeasiblePlan as error:
                self._known[tight_key] = _Known(stage.graph, None, error)
        known = self._known[tight_key]
        if known.solution is None:
            assert known.reason is not None
            raise known.reason
        return renamed(known.solution, known.graph, stage.graph)

    def _solved(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        budget: float | None,
        proven: bool,
    ) -> StageSolution:
        limit_s = self.clock.left_s * (_PROOF_SHARE if proven else _STAGE_SHARE)
        options = self.space.options
        return solve_stage(
            stage.graph,
            stage.table,
            self.mesh_costs(view),
            context,
            budget_bytes=budget,
            options=SolverOptions(options.solver, limit_s, options.target_gap, proven),
        )


def _with_flight(stage: StageSolution, in_flight: int) -> StageSolution:
    return replace(stage, prediction=replace(stage.prediction, in_flight=in_flight))


def _all_transfers(written: Sequence[Transfer], window: Window) -> list[Transfer]:
    """Those between written stages, between the stages that they stand for: neighbours send to
    neighbours. NotFoldable where one comes from further away, from a stage that stands for many."""
    found = []
    for transfer in written:
        source, target = transfer.source_stage, transfer.target_stage
        step = target - source
        senders = window.stands_for(source)
        if abs(step) > 1 and len(senders) > 1:
            raise NotFoldable(f"written stage {source} of {len(senders)} sends to {target}")
        for index in window.stands_for(target):
            sender = index - step if abs(step) == 1 else senders[0]
            found.append(replace(transfer, source_stage=sender, target_stage=index))
    return found


def best_schedule(
    space: Space, cut: Cut, transfers: Sequence[Transfer], stages: tuple[StageSolution, ...]
) -> Candidate:
    """The cut under the schedule that is fastest, of those that fit; the first of equal ones.
    NoFeasiblePlan where none fits."""
    costs = [StageCost.of(stage.prediction) for stage in stages]
    kinds = _kinds(space, cut)
    if len(kinds) > 1:
        kinds = sorted(kinds, key=lambda kind: _played(cut, costs, transfers, kind, few=True)[1])
    budgets = [space.budget_of(s.mesh) for s in stages[: cut.num_workers or len(stages)]]
    for kind in kinds:
        played, step_s = _played(cut, costs, transfers, kind)
        peaks = played.worker_peak_bytes
        fits = all(p <= b * _ROUNDING for p, b in zip(peaks, budgets, strict=True))
        if kind is cut.schedule and cut.num_workers is None:
            return Candidate(cut, stages, step_s, kind)
        if fits:
            held = tuple(map(_with_peak, stages, played.peak_bytes))
            return Candidate(cut, held, step_s, kind)
    raise NoFeasiblePlan(
        f"under the schedule {kinds[0]} some device would hold"
        f" {max(peaks) / 2**30:.2f} GiB: more than the budget",
        least_bytes=max(peaks),
    )


def _with_peak(stage: StageSolution, peak_bytes: float) -> StageSolution:
    """What a schedule holds beyond what the stage was solved for counts as transient."""
    more = peak_bytes - stage.prediction.peak_bytes
    if more <= 0:
        return stage
    transient = stage.prediction.transient_bytes + more
    return replace(stage, prediction=replace(stage.prediction, transient_bytes=transient))


def _kinds(space: Space, cut: Cut) -> list[ScheduleKind]:
    """The schedules that a cut can have, 1F1B first."""
    if cut.num_workers is not None:
        return [ScheduleKind.INTERLEAVED]
    if cut.num_stages == 1:
        return [space.schedules[0]]
    kinds: list[ScheduleKind] = [k for k in space.schedules if k is not ScheduleKind.INTERLEAVED]
    return kinds or [ScheduleKind.INTERLEAVED]


def _played(
    cut: Cut,
    costs: Sequence[StageCost],
    transfers: Sequence[Transfer],
    kind: ScheduleKind,
    *,
    few: bool = False,
) -> tuple[Pace, float]:
    """The pace, and the seconds of the step. Of very many microbatches those in the middle are
    alike: then the pace is that of fewer, and the rest is counted at it."""

    def play(count: int) -> Pace:
        return pace(kind, count, costs, transfers, cut.num_workers)

    count, workers = cut.num_microbatches, cut.num_workers or cut.num_stages
    some = min(4 * workers, 2 * workers + _FEW)
    if count <= 2 * some or (not few and count * cut.num_stages <= _MANY_CELLS):
        played = play(count)
        return played, played.step_s
    first, second = play(some), play(some + workers)
    pace_s = (second.step_s - first.step_s) / workers
    return second, first.step_s + (count - some) * pace_s
