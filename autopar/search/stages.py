"""One stage on one view, solved whole; what was solved before is remembered.

Equal stages are solved once, whatever their operators are called. Without a budget first: a
solution that fits is the best there is, for any budget and any number of microbatches in flight.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from autopar.errors import NoFeasiblePlan, OptionError
from autopar.estimate import MeshCosts
from autopar.graph.program import Graph
from autopar.intraop.solver import NotWorth
from autopar.intraop.stage import SolverOptions, StageProgram, StageSolution, stage_program
from autopar.intraop.stage_problem import StageContext
from autopar.lowering.lower import PreparedStage
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions
from autopar.search.clock import Clock
from autopar.search.pool import each
from autopar.search.unfold import renamed, same_structure

_PROOF_SHARE = 0.25  # of the time left: what proving one stage of the winner may take
_WORTH_A_FORK = 1200  # operators
_FAILED, _BUSY = 1, 2  # of a stage on a view
_STAGE_SHARE = 0.5  # of the time left: what one stage may take, so that the others get some


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A stage graph and its solution, or why nothing fits. target_gap: that it was solved to."""

    graph: Graph
    answer: StageSolution | NoFeasiblePlan
    target_gap: float


class Wanted(NamedTuple):
    """proven: with a MIP where the gap is above the target. worth_s: slower solutions are of no
    use (NotWorth). race_s: of a step, TooBusy where the stage is busy for longer, whatever its
    bytes."""

    proven: bool = False
    worth_s: float = math.inf
    race_s: float = math.inf


ANYTHING = Wanted()


class TooBusy(NotWorth):
    """A stage that takes longer than another cut's step."""


class ToldStage(NamedTuple):
    """A stage to be solved on a view within a budget. last: it has fitted on no other view, and has
    none left."""

    stage: PreparedStage
    view: LogicalMesh
    context: StageContext
    budget: float
    wanted: Wanted
    last: bool = True


class StageSolver:
    """target_gap: of stages that are not proven; those that are have the one of the options."""

    def __init__(
        self,
        options: SearchOptions,
        mesh_costs: Callable[[LogicalMesh], MeshCosts],
        clock: Clock,
        target_gap: float,
    ) -> None:
        self._options, self._mesh_costs, self._clock = options, mesh_costs, clock
        self._target_gap = target_gap
        self._known: dict[object, _Known] = {}
        self._open: tuple[object, StageProgram] | None = None  # the last one

    def ahead(self, told: Sequence[ToldStage]) -> None:
        """Solves stages within their budgets, several at a time, equal ones once. It ends where one
        is too busy on its last view, and late in a search where one does not fit there; what is not
        solved then is once it is asked for."""
        first: dict[object, int] = {}
        alike = [first.setdefault(_told_key(one), i) for i, one in enumerate(told)]
        new = [i for key, i in first.items() if key not in self._known]
        if sum(len(told[i].stage.graph.operators) for i in new) < _WORTH_A_FORK:
            return
        ends = [i for i, one in zip(alike, told, strict=True) if one.last]
        with mmap.mmap(-1, len(told)) as failed:  # all forks see it

            def solved(number: int) -> dict[object, StageSolution | NoFeasiblePlan]:
                one, before = told[number], set(self._known)
                enough = _FAILED if self._clock.late else _BUSY
                if any(failed[i] >= enough for i in ends):
                    return {}
                try:
                    self.within(one.stage, one.view, one.context, one.budget, one.wanted)
                except TooBusy:
                    failed[number] = _BUSY
                except NoFeasiblePlan:
                    failed[number] = _FAILED
                except OptionError:  # whoever asks for it is told
                    pass
                found = self._known.keys() - before
                return {key: self._known[key].answer for key in found}

            answers = each(solved, new)
        for i, answer in zip(new, answers, strict=True):
            gap = self._gap(told[i].wanted.proven)
            for key, found in answer.items():
                self._known.setdefault(key, _Known(told[i].stage.graph, found, gap))

    def free(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        *,
        proven: bool = False,
    ) -> StageSolution:
        """The fastest solution, whatever its bytes."""
        key = _key(stage, view, context, proven)
        known = self._known.get(key)
        if known is None:
            gap = self._gap(proven)
            found = self._solved(stage, view, context, None, Wanted(proven), gap)
            known = self._known[key] = _Known(stage.graph, found, gap)
        return _taken(known, stage, context)

    def within(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        budget: float,
        wanted: Wanted = ANYTHING,
        *,
        target_gap: float | None = None,
    ) -> StageSolution:
        """The fastest solution found that fits; NoFeasiblePlan where none does, NotWorth where what
        fits is too slow. target_gap: another one than that of the others. Solved to a narrower
        gap, a stage keeps the faster solution: the rounds within a budget may end elsewhere."""
        key = _told_key(ToldStage(stage, view, context, budget, wanted))
        gap = target_gap or self._gap(wanted.proven)
        known = self._known.get(key) or self._known.get((key, wanted))
        if known is None or known.target_gap > gap:
            answer: StageSolution | NoFeasiblePlan
            try:
                answer = self.free(stage, view, context, proven=wanted.proven)
                if busy_seconds(answer, context.num_microbatches) > wanted.race_s:
                    raise TooBusy(f"a step takes more than {wanted.race_s:.3g} s")
                if answer.prediction.peak_bytes > budget:
                    answer = self._solved(stage, view, context, budget, wanted, gap)
            except NoFeasiblePlan as error:
                answer = error
                if isinstance(error, NotWorth):
                    key = key, wanted
            known = _faster(_Known(stage.graph, answer, gap), known)
            self._known[key] = known
        return _taken(known, stage, context)

    def _gap(self, proven: bool) -> float:
        return self._options.target_gap if proven else self._target_gap

    def _solved(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        budget: float | None,
        wanted: Wanted,
        gap: float,
    ) -> StageSolution:
        proven = wanted.proven
        limit_s = self._clock.left_s * (_PROOF_SHARE if proven else _STAGE_SHARE)
        options = SolverOptions(self._options.solver, limit_s, gap, proven, wanted.worth_s)
        return self._program(stage, view, context, proven).solved(
            budget_bytes=budget, options=options
        )

    def _program(
        self, stage: PreparedStage, view: LogicalMesh, context: StageContext, proven: bool
    ) -> StageProgram:
        """That of the last solve, where it is the same stage under another budget."""
        key = id(stage), view, context, proven
        if self._open is None or self._open[0] != key:
            costs = self._mesh_costs(view)
            self._open = key, stage_program(stage.graph, stage.table, costs, context)
        return self._open[1]


def busy_seconds(stage: StageSolution, num_microbatches: int) -> float:
    """In a step: no schedule is faster."""
    p = stage.prediction
    return num_microbatches * (p.forward_s + p.backward_s) + p.step_s


def _key(
    stage: PreparedStage, view: LogicalMesh, context: StageContext, proven: bool
) -> tuple[str, LogicalMesh]:
    """Equal for stages that are equal but for their names."""
    first = min((op.layer for op in stage.graph.operators), default=0)
    owned = [context.owned is None or i.owner in context.owned for i in stage.graph.inputs]
    pins = [(context.pins or {}).get(i.owner) for i in stage.graph.inputs]
    dims = [stage.table.dims[i.ref] for i in stage.graph.inputs]
    text = (
        f"{same_structure(stage.graph)}\n{owned}\n{pins}\n{dims}\n"
        f"{context.num_microbatches}\n"
        f"{[(f.layer - first, f.count) for f in context.folds]}\n{proven}"
    )
    return hashlib.sha256(text.encode()).hexdigest(), view


def _told_key(one: ToldStage) -> object:
    """Of its solution within the budget."""
    key = _key(one.stage, one.view, one.context, one.wanted.proven)
    return key, one.context.in_flight, one.budget


def _faster(new: _Known, old: _Known | None) -> _Known:
    """The faster solution of the two, with what both prove."""
    if old is None or isinstance(old.answer, NoFeasiblePlan):
        return new
    if isinstance(new.answer, NoFeasiblePlan):
        return replace(old, target_gap=new.target_gap)
    bound = max(new.answer.bound, old.answer.bound)
    known = old if old.answer.seconds < new.answer.seconds else new
    assert isinstance(known.answer, StageSolution)
    answer = replace(known.answer, bound=min(bound, known.answer.seconds))
    return replace(known, answer=answer, target_gap=new.target_gap)


def _taken(known: _Known, stage: PreparedStage, context: StageContext) -> StageSolution:
    """What is known, in the names of a stage with so many microbatches in flight."""
    found = known.answer
    if isinstance(found, NoFeasiblePlan):
        raise found
    prediction = replace(found.prediction, in_flight=context.in_flight)
    return replace(renamed(found, known.graph, stage.graph), prediction=prediction)
