"""Random valid plans: any strategy, layout and placement that the rules allow, with no thought of
cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from autopar.graph.program import Graph, InputKind, OutputKind
from autopar.layout import Dims, is_plain, layout_text
from autopar.lowering.lower import PreparedStage, prepare_stages
from autopar.lowering.stages import parameter_sources
from autopar.mesh import LogicalMesh
from autopar.plan import ParallelPlan, ParameterPlacement, Remat, StagePlan, StagePrediction
from autopar.schedule import ScheduleKind
from autopar.sharding.strategy import layouts, strategies
from cost_models import Cluster

_NO_PREDICTION = StagePrediction(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 0.0)


def even_cuts(graph: Graph, num_stages: int) -> list[int]:
    """First layer of each stage, layers spread evenly."""
    return [len(graph.layer_names) * stage // num_stages for stage in range(num_stages)]


def random_plan(
    graph: Graph,
    meshes: Sequence[tuple[int, ...]],
    rng: random.Random,
    *,
    first_layers: Sequence[int] | None = None,
    remat: Remat = Remat.SELECTIVE,
    num_microbatches: int = 2,
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B,
    num_workers: int | None = None,
    offload: bool = False,
) -> ParallelPlan:
    """One stage per mesh; `graph` is at the shape of one microbatch and has layers. num_workers:
    groups of devices that the stages take turns on, one per stage by default. offload: every second
    parameter rests on the host."""
    first = list(first_layers or even_cuts(graph, len(meshes)))
    last = [*(f - 1 for f in first[1:]), len(graph.layer_names) - 1]
    stages: list[StagePlan] = []
    devices = 0
    for index, prepared in enumerate(prepare_stages(graph, remat, first)):
        mesh = LogicalMesh(meshes[index])
        if num_workers is not None and index >= num_workers:
            ranks = stages[index - num_workers].devices
        else:
            ranks = tuple(range(devices, devices + mesh.num_devices))
            devices += mesh.num_devices
        stage = _random_stage(prepared, mesh, ranks, (first[index], last[index]), rng)
        stages.append(_offloaded(stage) if offload else stage)
    text = f"cpu:1x{devices}"
    return ParallelPlan(
        graph=graph.fingerprint(),
        cluster_text=text,
        cluster=Cluster.parse(text).to_dict(),
        num_microbatches=num_microbatches,
        schedule=schedule,
        remat=(remat,) * len(graph.layer_names),
        layer_names=graph.layer_names,
        stages=tuple(stages),
        step_s=0.0,
        bubble=0.0,
        budget_bytes=0.0,
    )


def with_strategy(plan: ParallelPlan, operator: str, text: str) -> ParallelPlan:
    """The plan with this strategy for every operator whose name begins so, but for its hubs."""

    def changed(stage: StagePlan) -> StagePlan:
        ours = [n for n in stage.strategies if n.startswith(operator) and "__" not in n]
        return replace(stage, strategies={**stage.strategies, **dict.fromkeys(ours, text)})

    return replace(plan, stages=tuple(map(changed, plan.stages)))


def _offloaded(stage: StagePlan) -> StagePlan:
    placed = {
        name: replace(placement, host=number % 2 == 0)
        for number, (name, placement) in enumerate(stage.parameters.items())
    }
    return replace(stage, parameters=placed)


def _random_stage(
    prepared: PreparedStage,
    mesh: LogicalMesh,
    ranks: tuple[int, ...],
    layers: tuple[int, int],
    rng: random.Random,
) -> StagePlan:
    graph, table, sizes = prepared.graph, prepared.table, mesh.axis_sizes

    def layout(dims: Dims) -> str:
        return layout_text(dims, rng.choice(layouts(dims, sizes)))

    chosen = {
        op.name: rng.choice(
            strategies(table.rules[op.name], table.calls[op.name].operands, sizes)
        ).text
        for op in graph.operators
    }
    sources = parameter_sources(graph)
    parameters: dict[str, ParameterPlacement] = {}
    inputs: dict[str, str] = {}
    for inp in graph.inputs:
        dims = table.dims[inp.ref]
        if inp.kind is InputKind.PARAMETER:
            source = parameters.get(sources[inp.owner])
            parameters[inp.name] = ParameterPlacement(
                rest=layout(dims) if source is None else source.rest, step=layout(dims)
            )
        elif inp.kind in (InputKind.BATCH, InputKind.RECEIVED):
            inputs[inp.name] = layout(dims)
    outputs: dict[str, str] = {}
    for out in graph.outputs:
        dims = table.dims[out.ref]
        if out.kind is OutputKind.GRADIENT:
            plain = [x for x in layouts(dims, sizes, partial=True) if is_plain(dims, x, sizes)]
            outputs[out.target] = layout_text(dims, rng.choice(plain))
        elif out.kind is OutputKind.SENT:
            outputs[out.target] = layout(dims)
    return StagePlan(
        first_layer=layers[0],
        last_layer=layers[1],
        axis_sizes=sizes,
        crosses_nodes=mesh.crosses_nodes,
        devices=ranks,
        strategies=chosen,
        parameters=parameters,
        inputs=inputs,
        outputs=outputs,
        prediction=_NO_PREDICTION,
    )
