"""A candidate of the search: a stage cut, its solved stages, and its simulated step.

What stages may run on; and what the planner does with a candidate once its stages are solved: play
the schedule with the predicted costs, place the stages on the cluster's devices, write the solution
down as a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.errors import MeshError, OptionError
from autopar.graph.program import Graph, InputKind, Phase
from autopar.intraop.stage import StageSolution
from autopar.layout import layout_text
from autopar.lowering.lower import PreparedStage
from autopar.lowering.stages import parameter_sources
from autopar.mesh import LogicalMesh, Submesh, logical_meshes, submeshes
from autopar.options import SearchOptions
from autopar.plan import ParameterPlacement, StagePlan
from autopar.schedule import ActionKind, build_schedule
from autopar.simulate import StageCost, Timeline, Transfer, simulate
from cost_models import Cluster


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages of a candidate: first layers, submesh of each, and the table's view for each."""

    first_layers: tuple[int, ...]
    submeshes: tuple[Submesh, ...]
    views: tuple[tuple[LogicalMesh, ...], ...]  # of each stage, best first
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    cut: Cut
    stages: tuple[StageSolution, ...]
    timeline: Timeline
    step_s: float


def describe(candidate: Candidate) -> str:
    meshes = ", ".join(
        f"layers {first}.. on {stage.mesh}"
        for first, stage in zip(candidate.cut.first_layers, candidate.stages, strict=True)
    )
    return f"{candidate.step_s * 1e3:.2f} ms: {len(candidate.stages)} stage(s): {meshes}"


def simulate_stages(
    graphs: Sequence[Graph],
    stages: Sequence[StageSolution],
    options: SearchOptions,
    num_microbatches: int,
    *,
    num_workers: int | None = None,
    overlap: bool = False,
) -> Timeline:
    """Plays the schedule with the stages' predicted costs. num_workers: groups of devices on which
    the stages take turns, one per stage by default. overlap: of collectives once per step with
    compute, which the runtime does not do yet."""
    costs = [StageCost.of(stage.prediction) for stage in stages]
    schedule = build_schedule(options.schedule, len(stages), num_microbatches, num_workers)
    return simulate(schedule, costs, _transfers(graphs, stages), overlap=overlap)


def _transfers(graphs: Sequence[Graph], stages: Sequence[StageSolution]) -> list[Transfer]:
    """Seconds between each pair of stages per microbatch and direction."""
    sender = {
        out.target: index
        for index, graph in enumerate(graphs)
        for out in graph.outputs
        if out.kind == "sent"
    }
    seconds: dict[tuple[int, int, Phase], float] = {}
    for index, graph in enumerate(graphs):
        for inp in graph.inputs_of(InputKind.RECEIVED):
            key = (sender[inp.target], index, inp.phase)
            seconds[key] = seconds.get(key, 0.0) + stages[index].receive_s[inp.name]
    kinds = {Phase.FORWARD: ActionKind.FORWARD, Phase.BACKWARD: ActionKind.BACKWARD}
    return [Transfer(s, t, kinds[phase], value) for (s, t, phase), value in seconds.items()]


def place_stages(
    stages: Sequence[Submesh], cluster: Cluster, num_workers: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Global ranks of each stage. The largest are placed first, so that a submesh inside a node
    never straddles two (Alpa, OSDI'22, theorem 1). num_workers: stage s gets the ranks of stage s
    mod num_workers, and needs as many."""
    workers = len(stages) if num_workers is None else num_workers
    for index, submesh in enumerate(stages):
        if submesh.num_devices != stages[index % workers].num_devices:
            raise MeshError(
                f"stage {index} takes turns with stage {index % workers} on the same devices: it"
                f" has {submesh.num_devices} of {stages[index % workers].num_devices}"
            )
    order = sorted(range(workers), key=lambda i: (-stages[i].num_devices, i))
    placed: dict[int, tuple[int, ...]] = {}
    start = 0
    for index in order:
        size = stages[index].num_devices
        placed[index] = tuple(range(start, start + size))
        start += size
    if start != cluster.num_devices:
        raise MeshError(f"the stages use {start} of the {cluster.num_devices} devices of {cluster}")
    return tuple(placed[i % workers] for i in range(len(stages)))


def stage_plan(
    stage: PreparedStage,
    solution: StageSolution,
    layers: tuple[int, int],
    devices: tuple[int, ...],
) -> StagePlan:
    """The solution as texts."""
    graph, dims = stage.graph, stage.table.dims
    sources = parameter_sources(graph)
    parameters = {}
    for inp in graph.inputs_of(InputKind.PARAMETER):
        own = dims[inp.ref]
        rest = solution.parameters[sources[inp.owner]].rest
        step = solution.parameters[inp.name].step
        parameters[inp.name] = ParameterPlacement(layout_text(own, rest), layout_text(own, step))
    inputs = {
        i.name: layout_text(dims[i.ref], solution.inputs[i.name])
        for i in graph.inputs
        if i.kind in (InputKind.BATCH, InputKind.RECEIVED)
    }
    outputs = {
        o.target: layout_text(dims[o.ref], solution.outputs[o.target])
        for o in graph.outputs
        if o.target in solution.outputs
    }
    return StagePlan(
        first_layer=layers[0],
        last_layer=layers[1],
        axis_sizes=solution.mesh.axis_sizes,
        crosses_nodes=solution.mesh.crosses_nodes,
        devices=devices,
        strategies={name: s.text for name, s in solution.strategies.items()},
        parameters=parameters,
        inputs=inputs,
        outputs=outputs,
        prediction=solution.prediction,
    )


def allowed_views(
    cluster: Cluster, options: SearchOptions
) -> tuple[tuple[Submesh, ...], Mapping[Submesh, tuple[LogicalMesh, ...]]]:
    """Submeshes and their views, within the pins."""
    found: dict[Submesh, tuple[LogicalMesh, ...]] = {}
    for submesh in submeshes(cluster):
        views = logical_meshes(submesh, options.max_axes)
        if options.mesh_shape is not None:
            views = ()
            if math.prod(options.mesh_shape) == submesh.num_devices:
                views = (_pinned_view(options.mesh_shape, submesh),)
        if views:
            found[submesh] = views
    if not found:
        raise OptionError(
            f"mesh_shape {options.mesh_shape} is no submesh of {cluster}: submeshes have "
            f"{', '.join(str(s.num_devices) for s in submeshes(cluster))} devices"
        )
    return tuple(found), found


def _pinned_view(shape: tuple[int, ...], submesh: Submesh) -> LogicalMesh:
    """An axis crosses nodes if its groups reach beyond one node."""
    reach = [math.prod(shape[axis:]) for axis in range(len(shape))]
    per_node = submesh.devices_per_node
    crosses = tuple(size > 1 and r > per_node for size, r in zip(shape, reach, strict=True))
    return LogicalMesh(shape, crosses)
