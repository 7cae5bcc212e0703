"""Solves one stage: the integer program under the budget, with transients, and what it predicts.

The budget row counts what stands and what is saved; transients depend on the whole assignment. So the
program is solved for what is left of the budget beside the transients of the last solution, until both
fit together. Each round is a solve; three rounds have sufficed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts, local_bytes
from autopar.graph.program import Graph, InputKind, OutputKind
from autopar.intraop.build import (
    ParameterChoice,
    Part,
    StageContext,
    StageProblem,
    build_problem,
)
from autopar.intraop.memory_use import transient_bytes
from autopar.intraop.problem import IntraOpSolution, relative_gap
from autopar.intraop.solver import Solver, solve
from autopar.layout import Layout
from autopar.mesh import LogicalMesh
from autopar.plan import StagePrediction
from autopar.sharding.registry import RuleTable
from autopar.sharding.strategy import Strategy

_MAX_ROUNDS = 6
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class SolverOptions:
    solver: Solver = Solver.DUAL
    time_limit_s: float = 60.0
    target_gap: float = 0.01
    fallback: bool = True  # to HiGHS where the dual solver leaves a larger gap


@dataclass(frozen=True, slots=True, eq=False)
class StageSolution:
    """The chosen strategies and layouts of a stage. seconds and bound: objective per microbatch."""

    mesh: LogicalMesh
    strategies: Mapping[str, Strategy]
    parameters: Mapping[str, ParameterChoice]
    inputs: Mapping[str, Layout]
    outputs: Mapping[str, Layout]
    prediction: StagePrediction
    seconds: float
    bound: float
    receive_s: Mapping[str, float]  # per received value

    @property
    def gap(self) -> float:
        return relative_gap(self.seconds, self.bound)


def solve_stage(
    graph: Graph,
    table: RuleTable,
    costs: MeshCosts,
    context: StageContext,
    *,
    budget_bytes: float | None,
    options: SolverOptions = SolverOptions(),
) -> StageSolution:
    """Raises NoFeasiblePlan where nothing fits the budget together with its transients."""
    built = build_problem(graph, table, costs, context)
    limit = None
    transient = 0.0
    for _ in range(_MAX_ROUNDS):
        found = solve(
            built.problem.with_budget(limit),
            solver=options.solver,
            time_limit_s=options.time_limit_s,
            target_gap=options.target_gap,
            fallback=options.fallback,
        )
        solution = _read(graph, built, found, costs, context)
        prediction = solution.prediction
        if budget_bytes is None or prediction.peak_bytes <= budget_bytes:
            return solution
        transient = max(transient, prediction.transient_bytes)
        next_limit = budget_bytes - transient
        if next_limit <= 0 or (limit is not None and next_limit >= limit * (1 - 1e-9)):
            break
        limit = next_limit
    raise NoFeasiblePlan(
        f"a stage needs {prediction.peak_bytes / _GIB:.2f} GiB per device, of it "
        f"{prediction.transient_bytes / _GIB:.2f} GiB transient; the budget is "
        f"{(budget_bytes or 0) / _GIB:.2f} GiB. Use more microbatches, allow remat, or add devices",
        least_bytes=prediction.peak_bytes,
    )


def _read(
    graph: Graph,
    built: StageProblem,
    found: IntraOpSolution,
    costs: MeshCosts,
    context: StageContext,
) -> StageSolution:
    strategies: dict[str, Strategy] = {}
    parameters: dict[str, ParameterChoice] = {}
    inputs: dict[str, Layout] = {}
    outputs: dict[str, Layout] = {}
    for node, pick in zip(built.nodes, found.choice, strict=True):
        choice = node.choices[pick]
        if isinstance(choice, Strategy):
            strategies[node.name] = choice
        elif isinstance(choice, ParameterChoice):
            parameters[node.name] = choice
            inputs[node.name] = choice.step
        elif node.kind == "input":
            inputs[node.name] = choice
        else:
            outputs[node.name] = choice
    prediction = _predict(graph, built, found, strategies, inputs, costs, context)
    receive = {
        i.name: costs.receive_seconds(local_bytes(i.meta, inputs[i.name], costs.mesh.axis_sizes))
        for i in graph.inputs_of(InputKind.RECEIVED)
    }
    return StageSolution(
        mesh=costs.mesh,
        strategies=strategies,
        parameters=parameters,
        inputs=inputs,
        outputs=outputs,
        prediction=prediction,
        seconds=found.seconds,
        bound=found.bound,
        receive_s=receive,
    )


def part_seconds(built: StageProblem, choice: tuple[int, ...]) -> dict[Part, float]:
    """The objective of an assignment split by part of the step."""
    seconds = dict.fromkeys(Part, 0.0)
    problem = built.problem
    for part, costs, pick in zip(built.node_parts, problem.node_seconds, choice, strict=True):
        seconds[part] += float(costs[pick])
    pairs = zip(problem.edges, problem.edge_seconds, built.edge_parts, strict=True)
    for (u, v), matrix, part in pairs:
        seconds[part] += float(matrix[choice[u], choice[v]])
    return seconds


def kind_bytes(built: StageProblem, choice: tuple[int, ...]) -> dict[str, float]:
    """Bytes of an assignment by kind; saved ones are times the microbatches in flight."""
    nbytes = {"parameter": 0.0, "gradient": 0.0, "saved": 0.0, "": 0.0}
    for kind, sizes, pick in zip(
        built.byte_kinds, built.problem.node_bytes, choice, strict=True
    ):
        nbytes[kind] += float(sizes[pick])
    return nbytes


def _predict(
    graph: Graph,
    built: StageProblem,
    found: IntraOpSolution,
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    costs: MeshCosts,
    context: StageContext,
) -> StagePrediction:
    seconds = part_seconds(built, found.choice)
    nbytes = kind_bytes(built, found.choice)
    sizes = costs.mesh.axis_sizes
    optimizer = 0.0
    seen: set[str] = set()
    gradients = {o.target for o in graph.outputs_of(OutputKind.GRADIENT)}
    reduced = 0.0  # gradients at rest, beside the accumulated ones
    for inp in graph.inputs_of(InputKind.PARAMETER):
        node = next(n for n in built.nodes if n.kind == "input" and n.name == inp.name)
        choice = node.choices[found.choice[built.nodes.index(node)]]
        if not isinstance(choice, ParameterChoice) or inp.owner in seen:
            continue
        seen.add(inp.owner)
        owned = context.owned is None or inp.owner in context.owned
        rest = local_bytes(inp.meta, choice.rest, sizes)
        if owned and inp.requires_grad:
            element = costs.optimizer.state_bytes_per_element / inp.meta.dtype.itemsize
            optimizer += rest * element
        if inp.name in gradients:
            reduced = max(reduced, rest)
    return StagePrediction(
        forward_s=seconds[Part.FORWARD],
        backward_s=seconds[Part.BACKWARD],
        step_s=seconds[Part.STEP] * context.num_microbatches,
        parameter_bytes=nbytes["parameter"] - optimizer,
        gradient_bytes=nbytes["gradient"],
        optimizer_bytes=optimizer,
        saved_bytes=nbytes["saved"] / context.in_flight,
        in_flight=context.in_flight,
        transient_bytes=max(transient_bytes(graph, strategies, inputs, sizes), reduced),
    )
