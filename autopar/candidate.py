"""A candidate of the search: a stage cut, its solved stages, and its simulated step.

What stages may run on; and what the planner does with a candidate once its stages are solved: play
the schedule with the predicted costs, place the stages on the cluster's devices, write the solution
down as a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.actions import ActionKind
from autopar.errors import MeshError, OptionError
from autopar.graph.program import Graph, InputKind, Phase, Ref
from autopar.intraop.stage import StageSolution
from autopar.layout import Dims, layout_text
from autopar.lowering.stages import parameter_sources
from autopar.mesh import LogicalMesh, Submesh, logical_meshes, submeshes
from autopar.options import SearchOptions
from autopar.plan import ParameterPlacement, StagePlan
from autopar.schedule import ScheduleKind, build_schedule, in_flight_count
from autopar.simulate import StageCost, Timeline, Transfer, simulate
from cost_models import Cluster


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages of a candidate: first layers, submesh of each, and the table's views for each; seconds
    of the step by the tables. schedule: whose bytes in flight the stages have room for.
    num_workers: groups of devices on which the stages take turns, None for one per stage. room:
    microbatches that every stage has room for, where that is more than it holds."""

    first_layers: tuple[int, ...]
    submeshes: tuple[Submesh, ...]
    views: tuple[tuple[tuple[float, LogicalMesh], ...], ...]  # of each stage: seconds, best first
    seconds: float
    num_microbatches: int = 1
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    num_workers: int | None = None
    room: int = 0

    @property
    def num_stages(self) -> int:
        return len(self.first_layers)

    @property
    def stages_per_worker(self) -> int:
        return 1 if self.num_workers is None else self.num_stages // self.num_workers

    def in_flight(self, stage: int) -> int:
        """Microbatches that a stage holds at most."""
        return in_flight_count(
            self.schedule,
            self.num_stages - stage,
            self.num_microbatches,
            num_stages=self.num_stages,
            num_workers=self.num_workers,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """transfers: with which the schedule was played."""

    cut: Cut
    stages: tuple[StageSolution, ...]
    step_s: float
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    transfers: tuple[Transfer, ...] = ()

    @property
    def bubble(self) -> float:
        """Share of the step in which workers are idle."""
        count = self.cut.num_microbatches
        busy_s = math.fsum(
            count * (p.forward_s + p.backward_s) + p.step_s
            for p in (stage.prediction for stage in self.stages)
        )
        workers = self.cut.num_workers or len(self.stages)
        return max(0.0, 1 - busy_s / (workers * self.step_s)) if self.step_s > 0 else 0.0


def describe(candidate: Candidate) -> str:
    meshes = ", ".join(
        f"layers {first}.. on {stage.mesh}"
        for first, stage in zip(candidate.cut.first_layers, candidate.stages, strict=True)
    )
    return f"{candidate.step_s * 1e3:.2f} ms: {len(candidate.stages)} stage(s): {meshes}"


def simulate_stages(
    graphs: Sequence[Graph],
    stages: Sequence[StageSolution],
    schedule: ScheduleKind,
    num_microbatches: int,
    *,
    num_workers: int | None = None,
    overlap: bool = False,
) -> Timeline:
    """Plays the schedule with the stages' predicted costs. num_workers: groups of devices on which
    the stages take turns, one per stage by default. overlap: of collectives once per step with
    compute, which the runtime does not do yet."""
    costs = [StageCost.of(stage.prediction) for stage in stages]
    built = build_schedule(schedule, len(stages), num_microbatches, num_workers)
    return simulate(built, costs, stage_transfers(graphs, stages), overlap=overlap)


def stage_transfers(graphs: Sequence[Graph], stages: Sequence[StageSolution]) -> list[Transfer]:
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
    """Global ranks of each stage, within those of its node group. The largest are placed first, so
    that a submesh inside a node never straddles two (Alpa, OSDI'22, theorem 1). num_workers: stage
    s gets the ranks of stage s mod num_workers, and needs as many."""
    workers = len(stages) if num_workers is None else num_workers
    for index, submesh in enumerate(stages):
        first = stages[index % workers]
        if (submesh.num_devices, submesh.group) != (first.num_devices, first.group):
            raise MeshError(
                f"stage {index} takes turns with stage {index % workers} on the same devices: it"
                f" has {submesh.num_devices} of {first.num_devices}"
            )
    placed: dict[int, tuple[int, ...]] = {}
    for group in range(len(cluster.groups)):
        ranks = cluster.ranks(group)
        members = [i for i, submesh in enumerate(stages[:workers]) if submesh.group == group]
        start = ranks.start
        for index in sorted(members, key=lambda i: (-stages[i].num_devices, i)):
            placed[index] = tuple(range(start, start + stages[index].num_devices))
            start += stages[index].num_devices
        if start != ranks.stop:
            raise MeshError(
                f"the stages use {start - ranks.start} of the {len(ranks)} devices of "
                f"{cluster.groups[group]}: a plan uses all"
            )
    return tuple(placed[i % workers] for i in range(len(stages)))


def stage_plan(
    graph: Graph,
    dims: Mapping[Ref, Dims],
    solution: StageSolution,
    layers: tuple[int, int],
    devices: tuple[int, ...],
) -> StagePlan:
    """The solution of a prepared stage graph as texts. dims: of its values."""
    sources = parameter_sources(graph)
    parameters = {}
    for inp in graph.inputs_of(InputKind.PARAMETER):
        own = dims[inp.ref]
        source = solution.parameters[sources[inp.owner]]
        step = solution.parameters[inp.name].step
        parameters[inp.name] = ParameterPlacement(
            layout_text(own, source.rest), layout_text(own, step), source.host
        )
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


def budgets(cluster: Cluster, fraction: float) -> tuple[float, ...]:
    """Bytes that a plan may use of a device, for each node group."""
    return tuple(group.device.memory_bytes * fraction for group in cluster.groups)


def allowed_views(
    cluster: Cluster, options: SearchOptions, num_layers: int = 1
) -> tuple[tuple[Submesh, ...], Mapping[Submesh, tuple[LogicalMesh, ...]]]:
    """Submeshes and their views, within the pins."""
    shape = options.mesh_shape
    found: dict[Submesh, tuple[LogicalMesh, ...]] = {}
    for submesh in submeshes(cluster, num_layers):
        if shape is None:
            found[submesh] = logical_meshes(submesh, options.max_axes)
        elif math.prod(shape) == submesh.num_devices:
            found[submesh] = (submesh.view(shape),)
    if not found:
        sizes = sorted({s.num_devices for s in submeshes(cluster, num_layers)})
        raise OptionError(
            f"mesh_shape {shape} is no submesh of {cluster}: submeshes have "
            f"{', '.join(map(str, sizes))} devices"
        )
    return tuple(found), found
