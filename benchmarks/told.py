"""Plans that a person would write, as plans that run: the search takes no part in them.

The cut, the mesh, recomputation and microbatches are given, and the stages' integer programs have
only the choices that a recipe leaves: see `benchmarks.handmade` for data parallelism with its ZeRO
levels. For tensor parallelism operators may not take the rows of the batch, and matrices among the
parameters are sharded in the step.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from torch import nn

from autopar.api import ModelWorkload
from autopar.candidate import place_stages, simulate_stages
from autopar.errors import NoFeasiblePlan
from autopar.graph.family import GraphFamily
from autopar.graph.parameters import parameter_values
from autopar.graph.precision import Precision
from autopar.graph.repeat import whole_graph
from autopar.intraop.stage import SolverOptions, StageSolution
from autopar.intraop.stage_problem import Choice, Node, ParameterChoice
from autopar.layout import first_atom
from autopar.lowering.lower import PreparedStage
from autopar.mesh import LogicalMesh, Submesh
from autopar.plan import ParallelPlan, Remat
from autopar.schedule import ScheduleKind
from autopar.search.unfold import write_stages
from autopar.sharding.strategy import Strategy
from benchmarks.forced import Forced
from benchmarks.handmade import Grid, equal_split, layer_names, on_data_axis, row_factors
from cost_models import Cluster

_BUDGET = 0.9  # of a device's memory, as in the search
_SCHEDULE = ScheduleKind.ONE_F_ONE_B


def told_plan(
    model: nn.Module, batch: Any, cluster: Cluster, grid: Grid, precision: Precision
) -> ParallelPlan:
    """The best plan of the recipe. Where nothing fits without, everything is recomputed.
    NoFeasiblePlan where nothing fits at all."""
    family = GraphFamily(model, batch, None, precision)
    workload = ModelWorkload(family, (grid.microbatches,))
    with contextlib.closing(family):
        (group,) = cluster.groups
        budget = _BUDGET * group.device.memory_bytes
        forced = Forced(
            workload, cluster, budget, folded=True, solver=SolverOptions(fallback=False)
        )
        for remat in dict.fromkeys((grid.remat, Remat.SELECTIVE, Remat.FULL)):
            plan = _planned(forced, replace(grid, remat=remat))
            if plan is not None:
                return replace(plan, precision=str(precision))
    raise NoFeasiblePlan(f"{grid}: nothing fits into {budget:.3g} bytes per device")


def _planned(forced: Forced, grid: Grid) -> ParallelPlan | None:
    count = grid.microbatches
    names = layer_names(forced.program(count).folded)
    first_layers = equal_split(names, grid.pipeline)
    policies = (grid.remat,) * len(names)
    told = forced.cut(count, first_layers, policies)
    assert told.window is not None
    submesh = Submesh(1, grid.data * grid.tensor)
    view = submesh.view(tuple(n for n in (grid.data, grid.tensor) if n > 1) or (1,))
    restriction = on_data_axis(grid.zero) if grid.data > 1 else tensor_parallel
    solutions: list[StageSolution] = []
    for index in range(grid.pipeline):
        flight = min(count, grid.pipeline - index)
        solution = forced.solve(told, index, view, count, flight, restriction, str(grid))
        if solution is None:
            return None
        solutions.append(solution)
    timeline = simulate_stages(told.graphs, solutions, _SCHEDULE, count)
    graph = whole_graph(forced.workload.exact(count))  # type: ignore[attr-defined]
    devices = place_stages([submesh] * grid.pipeline, forced.cluster)
    solved = list(zip(solutions, told.prepared, strict=True))
    written_layer = told.window.written_layer
    found = write_stages(
        graph,
        policies,
        first_layers,
        solved,
        written_layer,
        devices,
        compiled=forced.compiled,
    )
    return ParallelPlan(
        graph=graph.fingerprint(),
        cluster_text=str(forced.cluster),
        cluster=forced.cluster.to_dict(),
        num_microbatches=count,
        schedule=_SCHEDULE,
        remat=policies,
        layer_names=graph.layer_names,
        stages=found.stages,
        step_s=timeline.step_s,
        bubble=0.0,
        budget_bytes=forced.budget_bytes,
        compiled=forced.compiled,
        fallbacks=found.fallbacks,
        rules=found.rules,
    )


def tensor_parallel(stage: PreparedStage, view: LogicalMesh) -> Any:
    """The Restriction of a mesh of one axis: no operator takes the rows of the batch, and matrices
    among the parameters are sharded, where that can be, and read so."""
    del view
    rows, dims, metas = row_factors(stage), stage.table.dims, stage.graph.metas()
    inputs = {i.name: i for i in stage.graph.inputs}
    weights = parameter_values(stage.graph)
    matrices = {
        op.name: [
            n
            for n, ref in enumerate(op.operands)
            if ref.name in weights and len(metas[ref].shape) > 1
        ]
        for op in stage.graph.operators
    }

    def fits(node: Node, choice: Choice) -> bool:
        if isinstance(choice, Strategy):
            factor = choice.factors[0]
            sharded = all(choice.operands[n][0] >= 0 for n in matrices[node.name])
            return sharded and (factor is None or factor.name not in rows.get(node.name, ()))
        inp = inputs.get(node.name)
        if inp is None or not inp.meta.shape:
            return True
        if isinstance(choice, ParameterChoice):
            return len(inp.meta.shape) < 2 or choice.step[0] >= 0
        by_rows = first_atom(dims[inp.ref], 0)
        return inp.kind not in ("batch", "received") or choice[0] != by_rows  # type: ignore[index]

    def keep(node: Node, choice: Choice) -> bool:
        return fits(node, choice) or not any(fits(node, c) for c in node.choices)

    return keep
