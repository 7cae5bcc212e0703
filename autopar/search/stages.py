"""One stage on one view, solved whole; what was solved before is remembered.

Equal stages are solved once, whatever their operators are called. Without a budget first: a
solution that fits is the best there is, for any budget and any number of microbatches in flight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts
from autopar.graph.program import Graph
from autopar.intraop.build import StageContext
from autopar.intraop.stage import SolverOptions, StageSolution, solve_stage
from autopar.lowering.lower import PreparedStage
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions
from autopar.search.clock import Clock
from autopar.search.unfold import renamed, same_structure

_PROOF_SHARE = 0.25  # of the time left: what proving one stage of the winner may take
_STAGE_SHARE = 0.5  # of the time left: what one stage may take, so that the others get some


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A solved stage graph; solution: None where nothing fits."""

    graph: Graph
    solution: StageSolution | None
    reason: NoFeasiblePlan | None = None


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
            found = self._solved(stage, view, context, None, proven)
            known = self._known[key] = _Known(stage.graph, found)
        return _taken(known, stage, context)

    def within(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        budget: float,
        *,
        proven: bool = False,
        target_gap: float | None = None,
    ) -> StageSolution:
        """The fastest solution found that fits; NoFeasiblePlan where none does. target_gap: another
        one than that of the others."""
        free = self.free(stage, view, context, proven=proven)
        if free.prediction.peak_bytes <= budget:
            return free
        key = (_key(stage, view, context, proven), context.in_flight, budget, target_gap)
        if key not in self._known:
            try:
                found = self._solved(stage, view, context, budget, proven, target_gap)
                self._known[key] = _Known(stage.graph, found)
            except NoFeasiblePlan as error:
                self._known[key] = _Known(stage.graph, None, error)
        return _taken(self._known[key], stage, context)

    def _solved(
        self,
        stage: PreparedStage,
        view: LogicalMesh,
        context: StageContext,
        budget: float | None,
        proven: bool,
        target_gap: float | None = None,
    ) -> StageSolution:
        limit_s = self._clock.left_s * (_PROOF_SHARE if proven else _STAGE_SHARE)
        gap = target_gap or (self._options.target_gap if proven else self._target_gap)
        return solve_stage(
            stage.graph,
            stage.table,
            self._mesh_costs(view),
            context,
            budget_bytes=budget,
            options=SolverOptions(self._options.solver, limit_s, gap, proven),
        )


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


def _taken(known: _Known, stage: PreparedStage, context: StageContext) -> StageSolution:
    """What is known, in the names of a stage with so many microbatches in flight."""
    if known.solution is None:
        assert known.reason is not None
        raise known.reason
    prediction = replace(known.solution.prediction, in_flight=context.in_flight)
    return replace(renamed(known.solution, known.graph, stage.graph), prediction=prediction)
