"""What parts of a stage's predicted seconds and bytes belong to: the schedules ask for them.

weight_s       of backward: operators of W (`graph.split`), with the reshards of what they read
               and of the gradients that they make
weight_bytes   what a microbatch holds from the end of B to W, each allocation once
gather_s       of the once-per-step work: parameters, borrowed ones too, to their layout in the
step, from the host where they rest there
reduce_s       of it: accumulated gradients to the layout at rest, to the host with those that rest
there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple

from autopar.estimate import MeshCosts, local_bytes, local_numel
from autopar.graph.hubs import is_hub
from autopar.graph.program import Graph, GraphInput, InputKind, Ref
from autopar.graph.split import held_values, weight_operators
from autopar.graph.work import is_view
from autopar.intraop.stage_problem import Chosen, Part, StageContext, StageProblem, weight
from autopar.layout import Layout


@dataclass(frozen=True, slots=True)
class Shares:
    """Seconds per microbatch (weight_s) or per step, bytes per microbatch and device."""

    weight_s: float
    weight_bytes: float
    gather_s: float
    reduce_s: float


class AtRest(NamedTuple):
    """What a stage keeps of a parameter, per device, as often as it counts.

    numel: elements that the optimizer updates, 0 of a frozen one. nbytes: of the value. host:
    whether it is there, with its gradient and the optimizer's states.
    """

    numel: float
    nbytes: float
    host: bool


def shares(
    graph: Graph,
    built: StageProblem,
    choice: Sequence[int],
    costs: MeshCosts,
    context: StageContext,
) -> Shares:
    """Of an assignment. O(edges)."""
    chosen = built.read(choice)
    seconds = built.part_seconds(choice)
    weights = weight_operators(graph)
    kept = parameters_at_rest(graph, built, chosen, costs, context)
    reduce_s = context.num_microbatches * _reduce_seconds(built, choice)
    reduce_s += gradient_copy_seconds(kept, costs)
    once_s = context.num_microbatches * seconds[Part.STEP]
    return Shares(
        weight_s=min(_weight_seconds(built, choice, weights), seconds[Part.BACKWARD]),
        weight_bytes=weight_bytes(graph, built, chosen, costs.mesh.axis_sizes, weights),
        gather_s=max(0.0, once_s - reduce_s - optimizer_seconds(kept, costs)),
        reduce_s=reduce_s,
    )


def held_parameters(graph: Graph) -> dict[str, GraphInput]:
    """Owner -> the input that holds the parameter at rest: the first."""
    held: dict[str, GraphInput] = {}
    for inp in graph.inputs_of(InputKind.PARAMETER):
        held.setdefault(inp.owner, inp)
    return held


def parameters_at_rest(
    graph: Graph, built: StageProblem, chosen: Chosen, costs: MeshCosts, context: StageContext
) -> list[AtRest]:
    """Those that this stage keeps between steps, each once."""
    kept, sizes = [], costs.mesh.axis_sizes
    for inp in held_parameters(graph).values():
        if context.owned is not None and inp.owner not in context.owned:
            continue
        dims, (rest, _, host) = built.dims[inp.ref], chosen.parameters[inp.name]
        count = weight(built.copies, inp.name)
        numel = local_numel(inp.meta, dims, rest, sizes) if inp.requires_grad else 0.0
        nbytes = local_bytes(inp.rest_meta, dims, rest, sizes)
        kept.append(AtRest(count * numel, count * nbytes, host))
    return kept


def optimizer_seconds(kept: Sequence[AtRest], costs: MeshCosts) -> float:
    """Per step, wherever each is updated."""
    return fsum(
        costs.host_optimizer_seconds(p.numel) if p.host else costs.optimizer_seconds(p.numel)
        for p in kept
        if p.numel
    )


def gradient_copy_seconds(kept: Sequence[AtRest], costs: MeshCosts) -> float:
    """Per step, of gradients to the host, in the type at rest."""
    return fsum(costs.host_copy_seconds(p.nbytes) for p in kept if p.host and p.numel)


def _weight_seconds(built: StageProblem, choice: Sequence[int], weights: frozenset[str]) -> float:
    inside = [node.kind == "operator" and node.name in weights for node in built.nodes]
    problem = built.problem
    total = 0.0  # added up as `StageProblem.part_seconds` does
    for costs, pick, ours in zip(problem.node_seconds, choice, inside, strict=True):
        if ours:
            total += float(costs[pick])
    edges = zip(problem.edges, problem.edge_seconds, built.edge_parts, strict=True)
    for (u, v), matrix, part in edges:
        gives = inside[u] and built.nodes[v].kind == "output"
        if part is Part.BACKWARD and (inside[v] or gives):
            total += float(matrix[choice[u], choice[v]])
        if part is Part.BACKWARD and gives:  # and is added to those before
            total += float(problem.node_seconds[v][choice[v]])
    return total


def _reduce_seconds(built: StageProblem, choice: Sequence[int]) -> float:
    """Per microbatch, as the objective has it."""
    problem = built.problem
    edges = zip(problem.edges, problem.edge_seconds, built.edge_parts, strict=True)
    return fsum(
        float(matrix[choice[u], choice[v]])
        for (u, v), matrix, part in edges
        if part is Part.STEP and built.nodes[v].kind == "output"
    )


def weight_bytes(
    graph: Graph,
    built: StageProblem,
    chosen: Chosen,
    sizes: tuple[int, ...],
    weights: frozenset[str],
) -> float:
    """Of a microbatch. weights: the operators of W. O(edges)."""
    made = {op.name: op for op in graph.operators}
    received = {inp.name for inp in graph.inputs_of(InputKind.RECEIVED)}
    metas = graph.metas()

    def layout(ref: Ref) -> Layout:
        if ref.name in made:
            return chosen.strategies[ref.name].results[ref.index]
        return chosen.inputs[ref.name]

    def memory(ref: Ref) -> Ref:
        """The value whose allocation this one is a view of."""
        op = made.get(ref.name)
        while op is not None and (is_view(op) or is_hub(op)):
            source = op.operands[0]
            if layout(source) != chosen.strategies[op.name].operands[0]:
                break  # a copy in another layout
            ref, op = source, made.get(source.name)
        return ref

    allocations = {memory(ref) for ref in held_values(graph, weights)}
    return fsum(
        weight(built.copies, ref.name)
        * local_bytes(metas[ref], built.dims[ref], layout(ref), sizes)
        for ref in allocations
        if ref.name in made or ref.name in received
    )
