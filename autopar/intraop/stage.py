"""Solves one stage: the integer program under the budget, with transients, and what it predicts.

What the program knows of bytes is a row; transients depend on the whole assignment. So the program
is first solved without a budget. If that does not fit, the row becomes what its solution holds at
its most crowded moment (`intraop.crowded`), and the program is solved within a limit on it: the
budget, less what the row left out where a solution did not fit, then bisected between what fits and
what does not. Each round is a solve; one or two usually do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts, local_bytes
from autopar.graph.program import Graph, InputKind, OutputKind, TensorMeta
from autopar.intraop.branch import is_small
from autopar.intraop.build import build_problem
from autopar.intraop.crowded import with_moment
from autopar.intraop.execution import execution_of
from autopar.intraop.fold import fold_problem
from autopar.intraop.free import Worth
from autopar.intraop.improve import Assignment
from autopar.intraop.memory import Earlier
from autopar.intraop.memory_use import (
    crowded_moment,
    fetch_bytes,
    gradient_bytes,
    reduce_bytes,
    transient_bytes,
)
from autopar.intraop.problem import IntraOpSolution, least_bytes, relative_gap
from autopar.intraop.shares import held_parameters, parameters_at_rest, shares
from autopar.intraop.solver import NotWorth, Solver, solve
from autopar.intraop.split import Split, best_split
from autopar.intraop.stage_problem import Chosen, ParameterChoice, Part, StageContext, StageProblem
from autopar.layout import Dims, Layout, coarsen
from autopar.mesh import LogicalMesh
from autopar.plan import StagePrediction
from autopar.sharding.registry import RuleTable
from autopar.sharding.strategy import Strategy

_MAX_ROUNDS = 8
_LEAST_S = 0.05  # a solve gets at least so long
_CLOSE = 0.02  # share of the budget between a limit that fits and one that does not: stop there
_WORTH_A_SPLIT = 0.2  # of the target gap: what there is to be gained
_AS_FAST = 1e-9  # relative: as the fastest solution of all
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class SolverOptions:
    solver: Solver = Solver.DUAL
    time_limit_s: float = 60.0
    target_gap: float = 0.01
    fallback: bool = True  # to HiGHS where the dual solver leaves a larger gap
    worth_s: float = math.inf  # NotWorth where nothing within the budget is as fast


@dataclass(frozen=True, slots=True, eq=False)
class StageSolution:
    """The chosen strategies and layouts of a stage. seconds and bound: objective per microbatch.
    tight: without the budget it would have been another one. split: of a fold whose layers would
    better not all be alike. notes: what a reader of the plan should know of the solve: a backend
    that failed, where the gap comes from."""

    mesh: LogicalMesh
    strategies: Mapping[str, Strategy]
    parameters: Mapping[str, ParameterChoice]
    inputs: Mapping[str, Layout]
    outputs: Mapping[str, Layout]
    prediction: StagePrediction
    seconds: float
    bound: float
    receive_s: Mapping[str, float]  # per received value
    tight: bool = False
    split: Split | None = None
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        return relative_gap(self.seconds, self.bound)


class _Found(NamedTuple):
    """One solve. rest_bytes: of its peak, what the program's row does not count."""

    stage: StageSolution
    choice: tuple[int, ...]
    rest_bytes: float


def solve_stage(
    graph: Graph,
    table: RuleTable,
    costs: MeshCosts,
    context: StageContext,
    *,
    budget_bytes: float | None,
    options: SolverOptions = SolverOptions(),
) -> StageSolution:
    """Raises NoFeasiblePlan where nothing fits the budget together with its transients, NotFoldable
    where the layers of a fold do not repeat."""
    program = stage_program(graph, table, costs, context)
    return program.solved(budget_bytes=budget_bytes, options=options)


def stage_program(
    graph: Graph, table: RuleTable, costs: MeshCosts, context: StageContext
) -> StageProgram:
    """Raises NotFoldable where the layers of a fold do not repeat."""
    built = build_problem(graph, table, costs, context)
    if context.folds:
        built = fold_problem(built, graph, context.folds)
    return StageProgram(graph, built, costs, context)


class StageProgram:
    """The program of one stage, built or given with fewer choices, and what its solves have found
    (a builder, local to them)."""

    def __init__(
        self, graph: Graph, built: StageProblem, costs: MeshCosts, context: StageContext
    ) -> None:
        self._graph, self._costs, self._context = graph, costs, context
        self._built, self._problem = built, built.problem
        self._execution = execution_of(graph, context)
        self._earlier = Earlier()
        self._free: _Found | None = None
        self._crowded = False
        self._options = SolverOptions()
        self._deadline = math.inf
        self._worth: Worth | None = None

    def solved(
        self, *, budget_bytes: float | None, options: SolverOptions = SolverOptions()
    ) -> StageSolution:
        """NoFeasiblePlan where nothing fits the budget together with its transients. The fastest
        solution of all is solved for once, whatever the budgets."""
        self._options, self._deadline = options, time.monotonic() + options.time_limit_s
        self._worth = None
        if self._free is None:
            self._free = self._within(None, fallback=options.fallback)
        free = self._free.stage
        if budget_bytes is None or free.prediction.peak_bytes <= budget_bytes:
            return free
        if not self._crowded:
            self._crowd(self._free)
            self._crowded = True
        if not math.isinf(options.worth_s):
            self._worth = Worth(options.worth_s, budget_bytes)
        first, limit = self._tight(budget_bytes)
        best, target_gap = first.stage, options.target_gap
        if best.gap > target_gap and options.fallback and time.monotonic() <= self._deadline:
            proven = self._within(limit, fallback=True).stage
            fits = proven.prediction.peak_bytes <= budget_bytes
            if fits and proven.seconds <= best.seconds:
                best = proven
            else:
                notes = tuple(dict.fromkeys((*best.notes, *proven.notes)))
                best = replace(best, notes=notes)
        bound = max(free.bound, self._earlier.bound(budget_bytes)[0])
        for row in (budget_bytes, limit) if is_small(self._problem) else ():
            if relative_gap(best.seconds, bound) <= target_gap:
                break
            found = self._within(row, branching=True).stage
            if row == budget_bytes:
                bound = max(bound, found.bound)
            if found.prediction.peak_bytes <= budget_bytes and found.seconds < best.seconds:
                best = found
        found = _with_true_bound(best, bound, limit)
        if found.gap > target_gap:
            found = replace(found, split=self._split(found, budget_bytes - first.rest_bytes))
        return found

    def _split(self, best: StageSolution, limit: float) -> Split | None:
        """Where the relaxation is better. limit: of the row, with transients like those of the
        best."""
        bound, _ = self._earlier.bound(limit)
        if relative_gap(best.seconds, bound) <= _WORTH_A_SPLIT * self._options.target_gap:
            return None
        points = [*self._earlier.points, *filter(None, [self._earlier.lightest])]
        return best_split(self._built, self._problem, self._context.folds, points, limit)

    def _crowd(self, free: _Found) -> None:
        """From now on the row is what the fastest solution holds when it holds most, if that is
        more than what stands and is saved."""
        stage, sizes = free.stage, self._costs.mesh.axis_sizes
        moment = crowded_moment(
            self._graph,
            self._built.dims,
            stage.strategies,
            stage.inputs,
            sizes,
            outputs=stage.outputs,
            copies=self._built.copies,
            execution=self._execution,
        )
        crowded = with_moment(self._graph, self._built, moment, sizes, self._execution)
        row = crowded.bytes(free.choice)
        if row <= self._problem.bytes(free.choice):
            return
        self._problem = crowded
        self._free = free._replace(rest_bytes=stage.prediction.peak_bytes - row)
        points = [Assignment(free.choice, stage.seconds, row)]
        self._earlier = replace(self._earlier, points=points, priced=None)

    def _within(
        self, limit: float | None, *, fallback: bool = False, branching: bool = False
    ) -> _Found:
        """Of least seconds with so many bytes in its row."""
        found = solve(
            self._problem.with_budget(limit),
            solver=self._options.solver,
            time_limit_s=max(_LEAST_S, self._deadline - time.monotonic()),
            target_gap=self._options.target_gap,
            fallback=fallback,
            branching=branching,
            earlier=self._earlier,
            worth=self._worth,
        )
        stage = _read(self._graph, self._built, found, self._costs, self._context)
        return _Found(stage, found.choice, stage.prediction.peak_bytes - found.bytes)

    def _tight(self, budget_bytes: float) -> tuple[_Found, float]:
        """The fastest solution found whose peak fits, and the limit on its row."""
        assert self._free is not None
        best: _Found | None = None
        best_limit = 0.0
        closest = self._free.stage.prediction
        # limits: one that fits or the least bytes, and one that is too much
        low, high = least_bytes(self._problem).bytes, budget_bytes
        if low > high:
            raise _too_little(budget_bytes, closest, low)
        limit = budget_bytes - self._free.rest_bytes
        if not low < limit < high:
            limit = high
        for _ in range(_MAX_ROUNDS):
            if best is not None and time.monotonic() > self._deadline:
                break
            try:
                found = self._within(limit)
            except NotWorth:
                raise
            except NoFeasiblePlan as error:  # the least bytes clash
                if error.least_bytes is None or not low < error.least_bytes < high:
                    raise _too_little(budget_bytes, closest, error.least_bytes) from error
                low = error.least_bytes
                limit = low * (1 + 1e-6)
                continue
            prediction = found.stage.prediction
            if prediction.peak_bytes <= budget_bytes:
                if best is None or found.stage.seconds < best.stage.seconds:
                    best, best_limit = found, limit
                low = limit
                limit += budget_bytes - prediction.peak_bytes
                as_fast = found.stage.seconds <= self._free.stage.seconds * (1 + _AS_FAST)
                if as_fast or prediction.peak_bytes >= (1 - _CLOSE) * budget_bytes:
                    break
            else:
                closest = min(closest, prediction, key=lambda p: p.peak_bytes)
                high = limit
                limit = budget_bytes - found.rest_bytes
            if high - low <= _CLOSE * budget_bytes:
                if best is not None or high <= low * (1 + 1e-6):
                    break
                limit = low * (1 + 1e-6)  # the lightest assignment itself
            elif not low < limit < high:
                limit = (low + high) / 2
        if best is None:
            raise _too_little(budget_bytes, closest, None)
        return best, best_limit


def _with_true_bound(best: StageSolution, bound: float, limit: float) -> StageSolution:
    """The bound of a budgeted solve holds within the limit on its row, which transients set. What
    holds for the stage is the bound of the row within the budget."""
    notes = best.notes
    if best.gap < relative_gap(best.seconds, bound):
        notes += (
            f"not all transients are in the program: within {limit / _GIB:.2f} GiB for what is, "
            f"the gap is {best.gap:.2%}",
        )
    return replace(best, bound=min(bound, best.seconds), tight=True, notes=notes)


def _too_little(
    budget_bytes: float, closest: StagePrediction, least: float | None
) -> NoFeasiblePlan:
    """least: bytes that every solution takes."""
    needed = "" if least is None else f"at least {least / _GIB:.2f} GiB are needed; "
    return NoFeasiblePlan(
        f"nothing fits the budget of {budget_bytes / _GIB:.2f} GiB per device: {needed}the closest "
        f"found needs {closest.peak_bytes / _GIB:.2f} GiB, of it "
        f"{closest.transient_bytes / _GIB:.2f} GiB transient. Use more microbatches, allow remat, "
        "or add devices",
        least_bytes=closest.peak_bytes if least is None else max(least, budget_bytes),
    )


def _read(
    graph: Graph,
    built: StageProblem,
    found: IntraOpSolution,
    costs: MeshCosts,
    context: StageContext,
) -> StageSolution:
    chosen = built.read(found.choice)
    sizes = costs.mesh.axis_sizes
    return StageSolution(
        mesh=costs.mesh,
        strategies=chosen.strategies,
        parameters=chosen.parameters,
        inputs=chosen.inputs,
        outputs=chosen.outputs,
        prediction=_predict(graph, built, found.choice, chosen, costs, context),
        seconds=found.seconds,
        bound=found.bound,
        receive_s={
            i.name: costs.receive_seconds(
                local_bytes(i.meta, built.dims[i.ref], chosen.inputs[i.name], sizes)
            )
            for i in graph.inputs_of(InputKind.RECEIVED)
        },
        notes=_notes(found),
    )


def _notes(found: IntraOpSolution) -> tuple[str, ...]:
    error = found.stats.get("fallback_error")
    if error is None:
        return ()
    return (f"HiGHS did not narrow the gap of {found.gap:.2%}: {error}",)


def _predict(
    graph: Graph,
    built: StageProblem,
    choice: tuple[int, ...],
    chosen: Chosen,
    costs: MeshCosts,
    context: StageContext,
) -> StagePrediction:
    seconds = built.part_seconds(choice)
    nbytes = built.kind_bytes(choice)
    optimizer, on_host = _kept_bytes(graph, built, chosen, costs, context)
    sizes = costs.mesh.axis_sizes
    in_step = transient_bytes(
        graph,
        built.dims,
        chosen.strategies,
        chosen.inputs,
        sizes,
        outputs=chosen.outputs,
        copies=built.copies,
        execution=execution_of(graph, context),
    )
    at_end = _reduce_bytes(graph, built, chosen, costs) - nbytes["saved"]
    if context.num_microbatches == 1:
        outputs, copies = chosen.outputs, built.copies
        at_end += gradient_bytes(graph, built.dims, outputs, sizes, copies=copies)
    held = [
        (inp.rest_meta, inp.meta, built.dims[inp.ref], chosen.parameters[inp.name])
        for inp in held_parameters(graph).values()
    ]
    at_start = fetch_bytes(held, sizes) - nbytes["saved"] - nbytes["gradient"]
    parts = shares(graph, built, choice, costs, context)
    return StagePrediction(
        forward_s=seconds[Part.FORWARD],
        backward_s=seconds[Part.BACKWARD],
        step_s=seconds[Part.STEP] * context.num_microbatches,
        parameter_bytes=nbytes["parameter"] - optimizer,
        gradient_bytes=nbytes["gradient"],
        optimizer_bytes=optimizer,
        saved_bytes=nbytes["saved"] / context.in_flight,
        in_flight=context.in_flight,
        transient_bytes=max(in_step, at_end, at_start),
        weight_s=parts.weight_s,
        weight_bytes=parts.weight_bytes,
        gather_s=parts.gather_s,
        reduce_s=parts.reduce_s,
        host_bytes=on_host,
    )


def _kept_bytes(
    graph: Graph, built: StageProblem, chosen: Chosen, costs: MeshCosts, context: StageContext
) -> tuple[float, float]:
    """Of the parameters that this stage keeps, each once: the optimizer's states on the device; and
    all that is on the host: values, gradients and states."""
    states = on_host = 0.0
    for p in parameters_at_rest(graph, built, chosen, costs, context):
        own = p.numel * costs.optimizer.state_bytes_per_element
        if p.host:
            on_host += own + p.nbytes * (2 if p.numel else 1)
        else:
            states += own
    return states, on_host


def _reduce_bytes(graph: Graph, built: StageProblem, chosen: Chosen, costs: MeshCosts) -> float:
    """Of the once-per-step reductions, beyond the accumulated gradients."""
    held, metas = held_parameters(graph), graph.metas()
    owner = {i.name: i.owner for i in graph.inputs_of(InputKind.PARAMETER)}
    gradients: list[tuple[TensorMeta, Dims, Layout, Layout]] = []
    sizes = costs.mesh.axis_sizes
    folded: dict[int, list[int]] = {}  # fold -> rows of its first copy
    for out in graph.outputs_of(OutputKind.GRADIENT):
        first = held[owner[out.target]]
        dims, layout = coarsen(built.dims[out.ref], chosen.outputs[out.target], sizes)
        copy = built.copies.get(out.target)
        if copy is not None and copy.which == 0:
            folded.setdefault(copy.fold, []).append(len(gradients))
        elif copy is not None and copy.fold in folded:  # the copies between come first
            gradients += [gradients[i] for i in folded.pop(copy.fold)] * (copy.times - 2)
        gradients.append((metas[out.ref], dims, layout, chosen.parameters[first.name].rest))
    return reduce_bytes(gradients, sizes)
