"""The stage cut: one joint graph to one graph per stage.

A stage holds the operators of consecutive layers, forward and backward. A value that another stage
reads becomes a SENT output here and a RECEIVED input there, whether the stages are neighbours or
not, so that skip connections and encoder outputs need nothing special. A parameter input that
several stages read appears in each of them; `parameter_owners` says which one keeps it between
steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from autopar.errors import InternalError
from autopar.graph.program import (
    Graph,
    GraphInput,
    GraphOutput,
    InputKind,
    Operator,
    OutputKind,
    Ref,
    check_graph,
)


def cut_stages(graph: Graph, first_layers: Sequence[int]) -> tuple[Graph, ...]:
    """One graph per stage; stage s holds the layers first_layers[s] to first_layers[s + 1] - 1.

    Pre: layers are set. Post: check_graph on each, check_cut on all. O(edges).
    """
    if not first_layers or first_layers[0] != 0 or list(first_layers) != sorted(set(first_layers)):
        raise InternalError(f"stages start at increasing layers from 0: got {first_layers}")
    bounds = [*first_layers[1:], len(graph.layer_names)]
    stage_of_layer = {
        layer: stage
        for stage, (first, stop) in enumerate(zip(first_layers, bounds, strict=True))
        for layer in range(first, stop)
    }
    parts: list[list[Operator]] = [[] for _ in first_layers]
    for op in graph.operators:
        parts[stage_of_layer[op.layer]].append(op)
    stages = tuple(_stage_graphs(graph, parts))
    check_cut(graph, stages)
    return stages


def stage_graph(graph: Graph, first_layer: int, last_layer: int) -> Graph:
    """The graph of one candidate stage."""
    own = [op for op in graph.operators if first_layer <= op.layer <= last_layer]
    return next(_stage_graphs(graph, [own]))


def _stage_graphs(graph: Graph, parts: Sequence[Sequence[Operator]]) -> Iterator[Graph]:
    """Of disjoint sets of operators."""
    metas = graph.metas()
    inputs = {i.ref: i for i in graph.inputs}
    position = {ref: n for n, ref in enumerate(inputs)}
    phases = {ref: op.phase for op in graph.operators for ref in op.refs}
    home = {op.name: part for part, operators in enumerate(parts) for op in operators}
    outputs: list[list[GraphOutput]] = [[] for _ in parts]
    for out in graph.outputs:
        if out.ref.name in home:
            outputs[home[out.ref.name]].append(out)
    for op in graph.operators:
        mine = home.get(op.name, -1)
        for ref in op.operands:
            source = home.get(ref.name, mine)
            if source != mine:
                outputs[source].append(GraphOutput(OutputKind.SENT, ref, str(ref)))

    for part, operators in enumerate(parts):
        received: dict[Ref, GraphInput] = {}
        used: dict[Ref, GraphInput] = {}

        def local(
            ref: Ref,
            part: int = part,
            received: dict[Ref, GraphInput] = received,
            used: dict[Ref, GraphInput] = used,
        ) -> Ref:
            if home.get(ref.name) == part:
                return ref
            if ref in inputs:
                used[ref] = inputs[ref]
                return ref
            if ref not in received:
                received[ref] = GraphInput(
                    str(ref), InputKind.RECEIVED, metas[ref], str(ref), phase=phases[ref]
                )
            return Ref(str(ref))

        body = [op.reading(local) for op in operators]
        # a gradient summed over uses in other stages may be made where nothing reads the parameter
        summed = {out.target for out in outputs[part] if out.kind is OutputKind.GRADIENT}
        used.update((ref, inp) for ref, inp in inputs.items() if inp.name in summed)
        yield check_graph(
            replace(
                graph,
                inputs=(
                    *(used[ref] for ref in sorted(used, key=position.__getitem__)),
                    *received.values(),
                ),
                operators=tuple(body),
                outputs=tuple(dict.fromkeys(outputs[part])),
                constants={k: v for k, v in graph.constants.items() if Ref(k) in used},
            )
        )


def check_cut(graph: Graph, stages: Sequence[Graph]) -> None:
    """Verifier: operators are partitioned; what one stage receives an earlier one (forward) or a
    later one (backward) sends; every output of the graph belongs to one stage."""
    if sum(len(stage.operators) for stage in stages) != len(graph.operators):
        raise InternalError("the stages do not partition the operators")
    sender = {
        out.target: index
        for index, stage in enumerate(stages)
        for out in stage.outputs_of(OutputKind.SENT)
    }
    for index, stage in enumerate(stages):
        for inp in stage.inputs_of(InputKind.RECEIVED):
            source = sender.get(inp.target)
            early = source is not None and (source < index) == (inp.phase == "forward")
            if not early or source == index:
                raise InternalError(
                    f"stage {index} receives {inp.target} ({inp.phase}) from stage {source}"
                )
    kept = sum(1 for stage in stages for out in stage.outputs if out.kind is not OutputKind.SENT)
    if kept != len(graph.outputs):
        raise InternalError(f"{len(graph.outputs) - kept} outputs of the graph are in no stage")


def parameter_owners(stages: Sequence[Graph]) -> Mapping[str, int]:
    """Canonical name of each parameter -> the stage that keeps it: the first that reads it."""
    owners: dict[str, int] = {}
    for index, stage in enumerate(stages):
        for inp in stage.inputs_of(InputKind.PARAMETER):
            owners.setdefault(inp.owner, index)
    return owners


def parameter_sources(stage: Graph) -> Mapping[str, str]:
    """Canonical name of each parameter -> the input of this stage that holds it at rest: the
    first."""
    sources: dict[str, str] = {}
    for inp in stage.inputs_of(InputKind.PARAMETER):
        sources.setdefault(inp.owner, inp.name)
    return sources
