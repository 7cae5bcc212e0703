"""Why a plan is as it is: what its stages' seconds and bytes are made of, and what each choice
would cost if it were another.

    stages         a plan's choices as assignments of the integer programs that the planner solves
    ledger         the objective of a stage, by what it pays for; the sum is the plan's prediction
    alternatives   of one node, the other choices with everything else as it is:
                   change(s) = c_v[s] - c_v[x_v] + sum over edges (R_uv[x_u, s] - R_uv[x_u, x_v])

Composites count with their own collectives as compute. Seconds, bytes per device.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

import numpy as np

from autopar.errors import OptionError, PlanError
from autopar.estimate import MeshCosts
from autopar.graph.hubs import is_hub
from autopar.graph.parameters import gradient_values, parameter_values
from autopar.graph.program import (
    Graph,
    InputKind,
    Operator,
    Phase,
    Ref,
)
from autopar.intraop.build import build_problem
from autopar.intraop.execution import execution_of
from autopar.intraop.memory_use import Alive, alive_at_peak
from autopar.intraop.problem import FloatArray
from autopar.intraop.shares import gradient_copy_seconds, optimizer_seconds, parameters_at_rest
from autopar.intraop.stage_problem import (
    Choice,
    Node,
    ParameterChoice,
    Part,
    StageContext,
    StageProblem,
)
from autopar.layout import layout_text
from autopar.lowering.lower import PreparedStage, stages_of_plan
from autopar.lowering.stages import parameter_owners, parameter_sources
from autopar.mesh import LogicalMesh, Submesh
from autopar.plan import ParallelPlan, StagePlan
from autopar.sharding.strategy import Strategy
from cost_models import Cluster

_KINDS = {"parameter": 0, "gradient": 1}  # what comes first
_LEAST_GAIN = 1e-4  # share of a stage's seconds: smaller changes are not worth a word


class Kind(StrEnum):
    """What seconds are spent on."""

    FORWARD = "forward compute"
    BACKWARD = "backward compute"
    RECOMPUTE = "recomputation"
    GATHER = "gathers of parameters"
    REDUCE = "reductions of gradients"
    ACCUMULATE = "gradients added to those before"
    RESHARD = "reshards of activations"
    TRANSFER = "transfers from other stages"
    STEP_GATHER = "gathers of parameters, once per step"
    STEP_REDUCE = "reductions of gradients, once per step"
    OPTIMIZER = "optimizer, once per step"


ONCE_PER_STEP = (Kind.STEP_GATHER, Kind.STEP_REDUCE, Kind.OPTIMIZER)


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """seconds: of the operator, per microbatch. reshard_s: of what it reads."""

    name: str
    overload: str
    module: str
    strategy: str
    seconds: float
    reshard_s: float


@dataclass(frozen=True, slots=True)
class Tensor:
    """What stands through the step. path: of the parameter, or of the module that makes a saved
    value. layout: of a parameter "rest / step". nbytes: with copies and optimizer states, and times
    the microbatches in flight."""

    kind: str  # "parameter", "gradient", "saved"
    name: str
    path: str
    layout: str
    nbytes: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another choice of one node: the change in seconds of the stage per step, and in bytes that
    stand or are saved."""

    text: str
    seconds: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Decision:
    """One node of a stage's program: what was chosen, and the other choices, cheapest first.

    kind: "operator", "parameter", "gradient", "input" or "output". detail: overload, or path in
    the model. seconds: of the node and all its edges, per step. forbidden: how many choices the
    ones around them do not allow.
    """

    stage: int
    kind: str
    name: str
    detail: str
    chosen: str
    seconds: float
    nbytes: float
    alternatives: tuple[Alternative, ...]
    forbidden: int


@dataclass(frozen=True, slots=True, eq=False)
class ExplainedStage:
    """A stage of a plan as an assignment of its integer program. edges: of each node, its
    neighbours, each with a matrix [own choices, the neighbour's]."""

    index: int
    plan: StagePlan
    prepared: PreparedStage
    costs: MeshCosts
    context: StageContext
    built: StageProblem
    choice: tuple[int, ...]
    operators: Mapping[str, Operator]
    edges: Mapping[int, Sequence[tuple[int, FloatArray]]]

    @property
    def num_microbatches(self) -> int:
        return self.context.num_microbatches


# ---- from a plan to assignments


def explained_stages(graph: Graph, plan: ParallelPlan) -> tuple[ExplainedStage, ...]:
    """graph: the layered one that the plan is for. Costs are those of the cluster in the plan, with
    the default optimizer. PlanError where the plan names what does not exist. O(operators x
    strategies^2) of each stage."""
    cluster = Cluster.from_dict(plan.cluster)
    prepared = stages_of_plan(graph, plan)
    owners = parameter_owners([p.graph for p in prepared])
    meshes: dict[LogicalMesh, MeshCosts] = {}
    found = []
    for index, (stage, chosen) in enumerate(zip(prepared, plan.stages, strict=True)):
        mesh = stage_mesh(chosen, cluster)
        context = StageContext(
            plan.num_microbatches,
            chosen.prediction.in_flight,
            frozenset(owner for owner, holder in owners.items() if holder == index),
            offload=any(p.host for p in chosen.parameters.values()),
            compiled=plan.compiled,
        )
        costs = meshes.setdefault(mesh, MeshCosts(cluster, mesh))
        built = build_problem(stage.graph, stage.table, costs, context)
        found.append(
            ExplainedStage(
                index=index,
                plan=chosen,
                prepared=stage,
                costs=costs,
                context=context,
                built=built,
                choice=assignment(built, stage.graph, chosen),
                operators={op.name: op for op in stage.graph.operators},
                edges=_neighbours(built),
            )
        )
    return tuple(found)


def stage_mesh(stage: StagePlan, cluster: Cluster) -> LogicalMesh:
    """The view on which a stage was planned, with its links."""
    for index, group in enumerate(cluster.groups):
        if stage.devices[0] in cluster.ranks(index):
            per_node = min(group.devices_per_node, len(stage.devices))
            submesh = Submesh(len(stage.devices) // per_node, per_node, index)
            return submesh.view(stage.axis_sizes)
    raise PlanError(f"device {stage.devices[0]} is not in {cluster}")


def assignment(built: StageProblem, graph: Graph, plan: StagePlan) -> tuple[int, ...]:
    """The plan's choice of every node of the program. PlanError where it has none."""
    sources = parameter_sources(graph)
    owner = {i.name: i.owner for i in graph.inputs_of(InputKind.PARAMETER)}
    choice = []
    for node in built.nodes:
        if len(node.choices) == 1:
            choice.append(0)
            continue
        if node.kind == "operator":
            wanted = plan.strategies.get(node.name)
        elif node.kind == "output":
            wanted = plan.outputs.get(node.name)
        elif node.name not in plan.parameters:
            wanted = plan.inputs.get(node.name)
        else:
            placed = plan.parameters[node.name]
            holds = sources[owner[node.name]] == node.name
            host = holds and placed.host
            wanted = _placement_text(placed.rest if holds else placed.step, placed.step, host)
        texts = [choice_text(built, graph, node, c) for c in node.choices]
        if wanted not in texts:
            raise PlanError(
                f"the plan gives {node.kind} {node.name} {wanted!r}; on this mesh it can be "
                f"{', '.join(map(repr, texts[:8]))}{', ...' if len(texts) > 8 else ''}"
            )
        choice.append(texts.index(wanted))
    return tuple(choice)


def choice_text(built: StageProblem, graph: Graph, node: Node, choice: Choice) -> str:
    """As plans have it: "b k", "S0 R", of a parameter "S0 R / R R" (at rest / in the step), "S0 R
    host / R R" where it rests on the host."""
    if isinstance(choice, Strategy):
        return choice.text
    ref = Ref(node.name)
    if node.kind == "output":
        ref = next((o.ref for o in graph.outputs if o.target == node.name), ref)
    dims = built.dims.get(ref, ())
    if isinstance(choice, ParameterChoice):
        rest, step = layout_text(dims, choice.rest), layout_text(dims, choice.step)
        return _placement_text(rest, step, choice.host)
    return layout_text(dims, choice)


def _placement_text(rest: str, step: str, host: bool) -> str:
    return f"{rest} host / {step}" if host else f"{rest} / {step}"


def _neighbours(built: StageProblem) -> Mapping[int, Sequence[tuple[int, FloatArray]]]:
    found: defaultdict[int, list[tuple[int, FloatArray]]] = defaultdict(list)
    for (u, v), matrix in zip(built.problem.edges, built.problem.edge_seconds, strict=True):
        found[u].append((v, matrix))
        found[v].append((u, matrix.T))
    return found


# ---- seconds


def ledger(stage: ExplainedStage) -> dict[Kind, float]:
    """Seconds by kind: per microbatch, those of ONCE_PER_STEP per step. O(edges)."""
    seconds = dict.fromkeys(Kind, 0.0)
    problem, nodes, batches = stage.built.problem, stage.built.nodes, stage.num_microbatches
    kinds = stage.built.byte_kinds
    for node, of, costs, pick in zip(nodes, kinds, problem.node_seconds, stage.choice, strict=True):
        value = float(costs[pick])
        if node.kind == "operator":
            seconds[_compute(stage.operators[node.name])] += value
        elif of == "gradient":
            seconds[Kind.ACCUMULATE] += value
        elif node.name in stage.built.received:
            seconds[Kind.TRANSFER] += value
        else:
            seconds[Kind.STEP_GATHER] += value * batches
    chosen = stage.built.read(stage.choice)
    kept = parameters_at_rest(stage.prepared.graph, stage.built, chosen, stage.costs, stage.context)
    seconds[Kind.OPTIMIZER] = optimizer_seconds(kept, stage.costs)
    seconds[Kind.STEP_REDUCE] = gradient_copy_seconds(kept, stage.costs)
    other = seconds[Kind.OPTIMIZER] + seconds[Kind.STEP_REDUCE]
    seconds[Kind.STEP_GATHER] = max(0.0, seconds[Kind.STEP_GATHER] - other)
    graph = stage.prepared.graph
    weights, gradients = parameter_values(graph), gradient_values(graph)
    edges = zip(problem.edges, problem.edge_seconds, stage.built.edge_parts, strict=True)
    for (u, v), matrix, part in edges:
        value = float(matrix[stage.choice[u], stage.choice[v]])
        to_gradient = nodes[v].kind == "output" and stage.built.byte_kinds[v] == "gradient"
        if part is Part.STEP:
            seconds[Kind.STEP_REDUCE if to_gradient else Kind.STEP_GATHER] += value * batches
        elif to_gradient or nodes[v].name in gradients:
            seconds[Kind.REDUCE] += value
        elif nodes[u].name in weights:
            seconds[Kind.GATHER] += value
        else:
            seconds[Kind.RESHARD] += value
    return seconds


def _compute(op: Operator) -> Kind:
    if op.recompute:
        return Kind.RECOMPUTE
    return Kind.FORWARD if op.phase is Phase.FORWARD else Kind.BACKWARD


def operator_costs(stage: ExplainedStage) -> tuple[OperatorCost, ...]:
    """By seconds with what they make reshard, most first."""
    found = []
    for number, node in enumerate(stage.built.nodes):
        if node.kind == "operator":
            op, pick = stage.operators[node.name], stage.choice[number]
            own = float(stage.built.problem.node_seconds[number][pick])
            reads = sum(
                float(matrix[pick, stage.choice[other]])
                for other, matrix in stage.edges[number]
                if other < number
            )
            text = stage.plan.strategies[node.name]
            found.append(OperatorCost(op.name, op.op_name, op.module, text, own, reads))
    return tuple(sorted(found, key=lambda c: (-c.seconds - c.reshard_s, c.name)))


# ---- bytes


def tensors(stage: ExplainedStage) -> tuple[Tensor, ...]:
    """What stands and what is saved, the largest first."""
    graph, built = stage.prepared.graph, stage.built
    owner = {i.name: i.owner for i in graph.inputs_of(InputKind.PARAMETER)}
    found = []
    for node, kind, sizes, pick in zip(
        built.nodes, built.byte_kinds, built.problem.node_bytes, stage.choice, strict=True
    ):
        if kind and sizes[pick]:
            text = choice_text(built, graph, node, _layout(node.choices[pick]))
            path = owner[node.name] if node.name in owner else _maker(stage, node.name)
            name = owner.get(node.name, node.name)
            found.append(Tensor(kind, name, path, text, float(sizes[pick])))
    return tuple(sorted(found, key=lambda t: (-t.nbytes, t.kind, t.name)))


def _maker(stage: ExplainedStage, name: str) -> str:
    """The module of the operator whose value a save keeps, "" of one that another stage makes."""
    op = stage.operators.get(name)
    while op is not None and is_hub(op):
        op = stage.operators.get(op.operands[0].name)
    return "" if op is None else op.module


def _layout(choice: Choice) -> Choice:
    """Of a save, the layout in which it is kept."""
    return choice.results[0] if isinstance(choice, Strategy) else choice


def at_peak(stage: ExplainedStage, phase: Phase) -> tuple[Alive, ...]:
    """What is alive when a phase holds most: of one microbatch, parameters not counted."""
    chosen = stage.built.read(stage.choice)
    return alive_at_peak(
        stage.prepared.graph,
        stage.built.dims,
        chosen.strategies,
        chosen.inputs,
        stage.costs.mesh.axis_sizes,
        phase=phase,
        outputs=chosen.outputs,
        execution=execution_of(stage.prepared.graph, stage.context),
    )


# ---- decisions


def decision(stage: ExplainedStage, number: int) -> Decision:
    """Of one node. O(choices x edges of the node)."""
    graph, built = stage.prepared.graph, stage.built
    node, pick = built.nodes[number], stage.choice[number]
    seconds = _costs(stage, number) * stage.num_microbatches
    nbytes = built.problem.node_bytes[number]
    others = [
        Alternative(
            choice_text(built, graph, node, node.choices[s]),
            float(seconds[s] - seconds[pick]),
            float(nbytes[s] - nbytes[pick]),
        )
        for s in np.flatnonzero(np.isfinite(seconds))
        if s != pick
    ]
    kind, name, detail = _described(stage, number)
    return Decision(
        stage=stage.index,
        kind=kind,
        name=name,
        detail=detail,
        chosen=choice_text(built, graph, node, node.choices[pick]),
        seconds=float(seconds[pick]),
        nbytes=float(nbytes[pick]),
        alternatives=tuple(sorted(others, key=lambda a: (a.seconds, a.nbytes, a.text))),
        forbidden=len(node.choices) - 1 - len(others),
    )


def _costs(stage: ExplainedStage, number: int) -> FloatArray:
    """Seconds per microbatch of each choice of a node, its edges included."""
    total = stage.built.problem.node_seconds[number].copy()
    for other, matrix in stage.edges[number]:
        total += matrix[:, stage.choice[other]]
    return total


def _described(stage: ExplainedStage, number: int) -> tuple[str, str, str]:
    """Kind, name and detail of a decision."""
    node = stage.built.nodes[number]
    if node.kind == "operator":
        op = stage.operators[node.name]
        return "operator", node.name, f"{op.op_name} {op.module}".strip()
    target = next((i.target for i in stage.prepared.graph.inputs if i.name == node.name), "")
    if stage.built.byte_kinds[number] in ("parameter", "gradient"):
        return stage.built.byte_kinds[number], target, node.name
    return node.kind, node.name, target


def best_change(stage: ExplainedStage) -> tuple[Decision, Alternative] | None:
    """The single change that would save most seconds, whatever its bytes. None where there is none
    worth a word: no budget stands in the way of single changes."""
    gains = []
    for number, pick in enumerate(stage.choice):
        seconds = _costs(stage, number)
        gains.append(float(seconds[pick] - seconds.min()))
    number = int(np.argmax(gains))
    if gains[number] <= _LEAST_GAIN * stage.built.problem.seconds(stage.choice):
        return None
    found = decision(stage, number)
    return found, found.alternatives[0]


def matching(stages: Iterable[ExplainedStage], pattern: str) -> tuple[Decision, ...]:
    """The decisions about operators, parameters and gradients that a pattern names, parameters
    first, then by seconds. Shell wildcards, or any part of a name where it has none; names of
    operators, of their modules, and of parameters. OptionError, with close names, for no match."""
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    found: list[Decision] = []
    known: set[str] = set()
    for stage in stages:
        owners = {i.name: i.owner for i in stage.prepared.graph.inputs_of(InputKind.PARAMETER)}
        for number, node in enumerate(stage.built.nodes):
            kind, name, _ = _described(stage, number)
            names = {name, owners.get(node.name, name)}
            if kind == "operator":
                names.add(stage.operators[node.name].module)
            known |= names
            if any(fnmatchcase(text, wanted) for text in names):
                found.append(decision(stage, number))
    if not found:
        words = {word for name in known for word in (name, *name.split("."))}
        close = difflib.get_close_matches(pattern, sorted(words), n=3)
        hint = f": did you mean {' or '.join(close)}?" if close else ""
        raise OptionError(f"no operator or parameter matches {pattern!r}{hint}")
    return tuple(sorted(found, key=lambda d: (_KINDS.get(d.kind, len(_KINDS)), -d.seconds)))
