"""Lowering: a graph and its plan to the local programs of every stage.

    recompute   the plan's save/recompute policy, on the joint graph
    cut         one graph per stage
    hubs        resharding points
    split       backward in two, where the schedule plays parameter gradients apart
    SPMD        forward, backward, and the once-per-step programs of each stage
    transfers   tiles between stages

`prepare_stages` is the part before strategies are chosen, which the planner shares: it plans
exactly the graphs that are lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar.errors import LayoutError, PlanError
from autopar.graph.hubs import insert_hubs, is_save
from autopar.graph.program import (
    Graph,
    GraphInput,
    InputKind,
    OutputKind,
    Phase,
    Ref,
    TensorMeta,
)
from autopar.layout import (
    PARTIAL,
    Dims,
    Layout,
    coarsen,
    is_valid,
    parse_layout,
    replicated,
)
from autopar.lowering.parts import Part, left_key, parts_of
from autopar.lowering.program import LocalProgram, Port
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.relayout import Relayout
from autopar.lowering.spmd import lower_program
from autopar.lowering.stages import cut_stages, parameter_owners, parameter_sources
from autopar.lowering.transfer import Transfer, make_tiles
from autopar.mesh import LogicalMesh
from autopar.plan import ParallelPlan, Remat, StagePlan
from autopar.schedule import Schedule, build_schedule
from autopar.sharding.registry import RuleTable
from autopar.sharding.rule import Call, Rule
from autopar.sharding.strategy import Strategy, strategies

LOSS = "loss"


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStage:
    """A stage graph with recompute and hubs, and the rules of its operators."""

    graph: Graph
    table: RuleTable


@dataclass(frozen=True, slots=True)
class StageParameter:
    """One parameter input of a stage.

    name: of the graph input; path: where the model has it; owner: its canonical name.
    source: the parameter input of this stage that holds the value at rest: itself, or, for a second
    use of a tied weight in the same stage, the first one.
    owned: this stage keeps the value between steps; otherwise it comes from its owner's stage at
    each step, and its gradient goes back there.
    host: at rest, with its gradient, in the memory of the device's host; False where not owned.
    meta, rest_meta: in the step and at rest. reduce_dtype: of its gradient, None as it is made.
    """

    name: str
    path: str
    owner: str
    source: str
    owned: bool
    requires_grad: bool
    meta: TensorMeta
    rest_meta: TensorMeta
    reduce_dtype: torch.dtype | None
    dims: Dims
    rest: Layout
    step: Layout
    host: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LoweredStage:
    """What the ranks of one stage run. Programs' inputs and outputs are keyed by the names of graph
    inputs and values; the loss is LOSS.

    gather: once per step, parameters from their layout at rest to the one held through the step.
    reduce: once per step, accumulated gradients to the parameters' layout at rest. Under a
    Precision both cast on the way, so that what crosses the network is narrow.
    weights: None where the schedule plays all of backward at once; else the operators that only
    gradients of parameters need. It reads saved and received values, as backward does, and values
    that backward made.
    batch, buffers: graph input name -> path in the batch, in the model. gradients: names of the
    parameter inputs whose gradient the stage makes. saved: values that backward or weights take
    from forward.
    """

    index: int
    mesh: LogicalMesh
    devices: tuple[int, ...]
    forward: LocalProgram
    backward: LocalProgram
    weights: LocalProgram | None
    gather: LocalProgram
    reduce: LocalProgram
    parameters: tuple[StageParameter, ...]
    batch: Mapping[str, str]
    buffers: Mapping[str, str]
    gradients: tuple[str, ...]
    saved: tuple[str, ...]

    @property
    def microbatch_programs(self) -> tuple[LocalProgram, ...]:
        """Those that are played for each microbatch, in order."""
        both = (self.forward, self.backward)
        return both if self.weights is None else (*both, self.weights)


@dataclass(frozen=True, slots=True, eq=False)
class LoweredPlan:
    """Everything that the runtime needs. loss_stage: index of the stage that makes the loss."""

    stages: tuple[LoweredStage, ...]
    transfers: tuple[Transfer, ...]
    schedule: Schedule
    loss_stage: int


def prepare_stages(
    graph: Graph,
    remat: Remat | Sequence[Remat],
    first_layers: Sequence[int],
    *,
    compiled: bool = False,
) -> tuple[PreparedStage, ...]:
    """Stage graphs as they are planned and lowered. remat: of each layer, or one for all. compiled:
    what is planned for."""
    recomputed = apply_recompute(graph, remat, compiled=compiled)
    joint = RuleTable(recomputed)
    return tuple(prepare_stage(stage, joint.dims) for stage in cut_stages(recomputed, first_layers))


def stages_of_plan(graph: Graph, plan: ParallelPlan) -> tuple[PreparedStage, ...]:
    """As they were planned. graph: the layered one that the plan is for."""
    first_layers = [stage.first_layer for stage in plan.stages]
    return prepare_stages(graph, plan.remat, first_layers, compiled=plan.compiled)


def prepare_stage(
    stage: Graph, dims: Mapping[Ref, Dims], known: dict[Call, Rule] | None = None
) -> PreparedStage:
    """dims: of the joint graph's values, so that a received value keeps its atoms. known: as of
    RuleTable."""
    by_text = {str(ref): d for ref, d in dims.items()}
    hubbed = insert_hubs(stage)
    received = {i.name: by_text[i.target] for i in hubbed.inputs_of(InputKind.RECEIVED)}
    return PreparedStage(hubbed, RuleTable(hubbed, received, known))


def lower_plan(graph: Graph, plan: ParallelPlan) -> LoweredPlan:
    """PlanError where the plan belongs to another graph or names what does not exist."""
    if plan.graph != graph.fingerprint():
        raise PlanError(
            f"the plan was made for another model, batch or version (graph {plan.graph}, "
            f"this one is "
            f"{graph.fingerprint()}): plan again with the model as it is now"
        )
    if plan.layer_names != graph.layer_names:
        raise PlanError(
            f"the plan cuts the model into {len(plan.layer_names)} layers, this graph has "
            f"{len(graph.layer_names)}: cluster it with num_layers={len(plan.layer_names)}"
        )
    prepared = stages_of_plan(graph, plan)
    _check_rules(plan, prepared)
    owners = parameter_owners([p.graph for p in prepared])
    stages = tuple(
        _lower_stage(index, stage, stage_plan, owners, split=plan.schedule.splits_backward)
        for index, (stage, stage_plan) in enumerate(zip(prepared, plan.stages, strict=True))
    )
    loss = [i for i, p in enumerate(prepared) if p.graph.outputs_of(OutputKind.LOSS)]
    return LoweredPlan(
        stages=stages,
        transfers=(*_value_transfers(prepared, stages), *_parameter_transfers(stages)),
        schedule=build_schedule(
            plan.schedule, len(stages), plan.num_microbatches, plan.num_workers
        ),
        loss_stage=loss[0],
    )


def _check_rules(plan: ParallelPlan, prepared: Sequence[PreparedStage]) -> None:
    """Rules of operators that autopar has no row for are those of the plan: its strategies are in
    their letters. PlanError otherwise."""
    here: dict[str, set[str]] = {}
    for stage in prepared:
        for target, text in stage.table.unwritten().items():
            here.setdefault(target, set()).update(_rules_of(text))
    for target in sorted(here.keys() | plan.rules.keys()):
        planned = _rules_of(plan.rules.get(target, "none"))
        found = here.get(target, {"none"})
        if planned != found:
            raise PlanError(
                f"the plan was made with another sharding rule of {target} than the one here:"
                f" {' | '.join(sorted(planned))} there, {' | '.join(sorted(found))} here. Register"
                " the same rule on every machine (autopar.register_rule), use the same version of"
                " the operator, or plan again"
            )


def _rules_of(text: str) -> set[str]:
    """The rules in a text of `RuleTable.unwritten`; why one is replicated does not count."""
    return {"replicated" if t.startswith("replicated:") else t for t in text.split(" | ")}


def _lower_stage(
    index: int, stage: PreparedStage, plan: StagePlan, owners: Mapping[str, int], *, split: bool
) -> LoweredStage:
    mesh = LogicalMesh(plan.axis_sizes, plan.crosses_nodes)
    graph, table = stage.graph, stage.table
    chosen = _chosen_strategies(stage, plan, mesh)
    layouts = {i.name: _input_layout(i, plan, table.dims[i.ref], mesh) for i in graph.inputs}
    sources = parameter_sources(graph)
    parameters = tuple(
        StageParameter(
            name=i.name,
            path=i.target,
            owner=i.owner,
            source=sources[i.owner],
            owned=owners[i.owner] == index,
            requires_grad=i.requires_grad,
            meta=i.meta,
            rest_meta=i.rest_meta,
            reduce_dtype=i.reduce,
            dims=table.dims[i.ref],
            rest=_parse(
                plan.parameters[sources[i.owner]].rest,
                table.dims[i.ref],
                mesh,
                f"parameter {i.target!r} at rest",
            ),
            step=layouts[i.name],
            host=plan.parameters[sources[i.owner]].host and owners[i.owner] == index,
        )
        for i in graph.inputs_of(InputKind.PARAMETER)
    )
    programs = [
        _program(stage, plan, mesh, chosen, layouts, part) for part in parts_of(graph, split=split)
    ]
    gradients = tuple(o.target for o in graph.outputs_of(OutputKind.GRADIENT))
    return LoweredStage(
        index=index,
        mesh=mesh,
        devices=plan.devices,
        forward=programs[0],
        backward=programs[1],
        weights=programs[2] if split else None,
        gather=_gather_program(parameters, mesh),
        reduce=_reduce_program(parameters, programs[1:], gradients, mesh),
        parameters=parameters,
        batch={i.name: i.target for i in graph.inputs_of(InputKind.BATCH)},
        buffers={i.name: i.target for i in graph.inputs_of(InputKind.BUFFER)},
        gradients=gradients,
        saved=tuple(op.name for op in graph.operators if is_save(op)),
    )


def _chosen_strategies(
    stage: PreparedStage, plan: StagePlan, mesh: LogicalMesh
) -> dict[str, Strategy]:
    """Each operator's strategy by its text."""
    chosen = {}
    for op in stage.graph.operators:
        text = plan.strategies.get(op.name)
        if text is None:
            raise PlanError(f"the plan has no strategy for operator {op.name}")
        rule, call = stage.table.rules[op.name], stage.table.calls[op.name]
        for strategy in strategies(rule, call.operands, mesh.axis_sizes):
            if strategy.text == text:
                chosen[op.name] = strategy
                break
        else:
            raise PlanError(f"operator {op.name} has no strategy {text!r} on mesh {mesh}")
    return chosen


def _input_layout(inp: GraphInput, plan: StagePlan, dims: Dims, mesh: LogicalMesh) -> Layout:
    """The layout in which the programs of the stage take an input."""
    if inp.kind is InputKind.PARAMETER:
        if inp.name not in plan.parameters:
            raise PlanError(f"the plan does not place parameter {inp.target!r} ({inp.name})")
        return _parse(plan.parameters[inp.name].step, dims, mesh, f"parameter {inp.target!r}")
    if inp.name in plan.inputs:
        return _parse(plan.inputs[inp.name], dims, mesh, f"input {inp.name!r}")
    return replicated(mesh.num_axes)


def _parse(text: str, dims: Dims, mesh: LogicalMesh, what: str, *, partial: bool = False) -> Layout:
    """A layout of the plan. PlanError where the value cannot have it on this mesh."""
    try:
        layout = parse_layout(text, dims)
    except LayoutError as error:
        raise PlanError(f"the plan gives {what} the layout {text!r}: {error}") from error
    fits = len(layout) == mesh.num_axes and is_valid(dims, layout, mesh.axis_sizes)
    if not fits or (PARTIAL in layout and not partial):
        raise PlanError(
            f"the plan gives {what} the layout {text!r}, which a value with dims {dims} "
            f"cannot have "
            f"on mesh {mesh}"
        )
    return layout


def _program(
    stage: PreparedStage,
    plan: StagePlan,
    mesh: LogicalMesh,
    chosen: Mapping[str, Strategy],
    layouts: Mapping[str, Layout],
    part: Part,
) -> LocalProgram:
    """The program of a part; what others made it takes in the layout in which it was made."""
    graph, table = stage.graph, stage.table
    metas = graph.metas()
    own = {op.name for op in part.operators}
    made = {op.name: op for op in graph.operators}
    given = {i.name: i for i in graph.inputs}
    read = dict.fromkeys(ref for op in part.operators for ref in op.operands if ref.name not in own)
    outputs: dict[str, tuple[Ref, TensorMeta, Layout]] = {}
    for out in graph.outputs:
        made_here = out.ref.name in own
        if made_here or (out.ref.name in given and given[out.ref.name].phase is part.passes):
            key = LOSS if out.kind is OutputKind.LOSS else out.target
            layout = replicated(mesh.num_axes)
            if key in plan.outputs:
                dims, gradient = table.dims[out.ref], out.kind is OutputKind.GRADIENT
                layout = _parse(plan.outputs[key], dims, mesh, f"output {key!r}", partial=gradient)
            outputs[key] = (out.ref, metas[out.ref], layout)
            if not made_here:
                read[out.ref] = None
    for ref in part.leaves:
        layout = chosen[ref.name].results[ref.index]
        outputs[left_key(made[ref.name], ref)] = (ref, metas[ref], layout)
    inputs = {}
    for ref in read:
        if ref.name in graph.constants:
            continue
        if ref.name in given:
            key, layout = ref.name, layouts[ref.name]
        else:
            key = left_key(made[ref.name], ref)
            layout = chosen[ref.name].results[ref.index]
        inputs[key] = Port(ref, metas[ref], table.dims[ref], layout)
    constants = {
        i.name: Port(i.ref, i.meta, table.dims[i.ref], replicated(mesh.num_axes))
        for i in graph.inputs_of(InputKind.CONSTANT)
        if i.ref in read
    }
    program = lower_program(
        part.operators,
        inputs={**inputs, **constants},
        outputs=outputs,
        strategies=chosen,
        calls=table.calls,
        rules=table.rules,
        dims=table.dims,
        mesh=mesh.axis_sizes,
        verify=True,
    )
    # constants are part of the program: their values travel with it
    values = {program.inputs[name].ref.name: graph.constants[name] for name in constants}
    ports = {key: port for key, port in program.inputs.items() if key not in constants}
    return replace(program, inputs=ports, constants=values)


def _gather_program(parameters: Sequence[StageParameter], mesh: LogicalMesh) -> LocalProgram:
    """Casts first: what is gathered is narrow. What rests on the host comes from there shard by
    shard, each cast before the next one comes."""
    build = Relayout(mesh)
    narrow = {}
    for p in parameters:
        if p.source == p.name:
            at_rest = build.take(p.name, p.rest_meta, p.dims, p.rest, host=p.host)
            if p.host:
                at_rest = build.load(at_rest, p.rest)
            narrow[p.name] = build.cast(at_rest, p.meta.dtype, p.rest)
    for p in parameters:
        build.give(p.name, narrow[p.source], p.step)
    return build.program()


def _reduce_program(
    parameters: Sequence[StageParameter],
    makers: Sequence[LocalProgram],
    gradients: Sequence[str],
    mesh: LogicalMesh,
) -> LocalProgram:
    """Where a gradient changes its layout it does so in the type of its reduction. makers: the
    programs that make gradients."""
    by_name = {p.name: p for p in parameters}
    build = Relayout(mesh)
    for name in gradients:
        port = next(m.outputs[name] for m in makers if name in m.outputs)
        p = by_name[name]
        # parameters have one atom per dim
        dims, layout = coarsen(port.dims, port.layout, mesh.axis_sizes)
        gradient = build.take(name, port.meta, dims, layout)
        if layout != p.rest:
            gradient = build.cast(gradient, p.reduce_dtype, layout)
            gradient = build.cast(gradient, port.meta.dtype, p.rest)
        build.give(name, gradient, p.rest)
    return build.program()


def _value_transfers(
    prepared: Sequence[PreparedStage], stages: Sequence[LoweredStage]
) -> list[Transfer]:
    """Activations and their gradients, each microbatch."""
    sender = {
        out.target: index
        for index, stage in enumerate(prepared)
        for out in stage.graph.outputs_of(OutputKind.SENT)
    }
    transfers = []
    for index, stage in enumerate(prepared):
        for inp in stage.graph.inputs_of(InputKind.RECEIVED):
            source = stages[sender[inp.target]]
            sent = (source.forward if inp.phase is Phase.FORWARD else source.backward).outputs
            programs = stages[index].microbatch_programs
            port = next(p.inputs[inp.name] for p in programs if inp.name in p.inputs)
            transfers.append(
                _transfer(
                    (inp.target, inp.name),
                    (source, stages[index]),
                    inp.phase,
                    inp.meta,
                    port.dims,
                    (sent[inp.target].layout, port.layout),
                )
            )
    return transfers


def _parameter_transfers(stages: Sequence[LoweredStage]) -> list[Transfer]:
    """Tied or shared parameters, once per step: from the owner's stage to the others. Gradients go
    the same way back."""
    owned = {
        p.owner: (stage, p)
        for stage in stages
        for p in stage.parameters
        if p.owned and p.source == p.name
    }
    transfers = []
    for stage in stages:
        for parameter in stage.parameters:
            if not parameter.owned and parameter.source == parameter.name:
                source, original = owned[parameter.owner]
                transfers.append(
                    _transfer(
                        (original.name, parameter.name),
                        (source, stage),
                        None,
                        parameter.rest_meta,
                        parameter.dims,
                        (original.rest, parameter.rest),
                    )
                )
    return transfers


def _transfer(
    keys: tuple[str, str],
    ends: tuple[LoweredStage, LoweredStage],
    phase: Phase | None,
    meta: TensorMeta,
    dims: Dims,
    layouts: tuple[Layout, Layout],
) -> Transfer:
    source, target = ends
    tiles = make_tiles(dims, layouts[0], source.mesh, layouts[1], target.mesh)
    return Transfer(
        keys[0], keys[1], source.index, target.index, phase, meta, dims, *layouts, tiles
    )
