"""The search: from a captured graph and a cluster to a plan.

    layers      graph.layers, unless the graph has them
    recompute   the policies in order of cost, until one fits with memory to spare
    points      per distinct layer and mesh view: solutions from fast to small (intraop.compose)
    stage cut   inter-op dynamic program over layers x submeshes, per number of stages
    exact       the best few cuts: every stage's whole integer program under the budget
    simulate    the actual schedule, event by event; the plan is what simulates best

The result is deterministic: it depends on the graph, the cluster and the options only.
"""

from __future__ import annotations

import difflib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.candidate import (
    Candidate,
    Cut,
    allowed_views,
    budgets,
    describe,
    place_stages,
    simulate_stages,
    stage_plan,
)
from autopar.errors import NoFeasiblePlan, OptionError
from autopar.estimate import MeshCosts
from autopar.graph.layers import cluster_layers, layer_classes
from autopar.graph.program import Graph, InputKind
from autopar.interop import dp
from autopar.interop.problem import InterOpProblem, InterOpSolution
from autopar.intraop.build import StageContext
from autopar.intraop.compose import Point, boundary_bytes, layer_points, stage_table
from autopar.intraop.stage import SolverOptions, StageSolution, solve_stage
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import cut_stages, parameter_owners, stage_graph
from autopar.mesh import LogicalMesh, Submesh
from autopar.options import SearchOptions
from autopar.plan import (
    ParallelPlan,
    Remat,
    SearchRecord,
)
from autopar.schedule import in_flight_count
from autopar.sharding.registry import RuleTable
from cost_models import Cluster

_LOG = logging.getLogger(__name__)
_PROOF_SHARE = 0.25  # of the time left: what proving one stage of the winner may take
_REMAT_ORDER = (Remat.NONE, Remat.SELECTIVE, Remat.FULL)

# A stage cut or mesh view whose table value is this much above the best is not solved exactly.
# Tables and exact solutions differ by up to 3 % where memory is free, more where it binds
# (tests/unit/intraop/test_compose.py).
_WORTH_SOLVING = 1.06
_WORTH_SOLVING_TIGHT = 1.2

Progress = Callable[[str], None]


@dataclass(slots=True)
class _Clock:
    """Seconds by pass, and the deadline: of the search, and of the part of it that goes on."""

    limit_s: float
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    part_ends: float = math.inf

    def begin_part(self, num_left: int) -> None:
        """The time left, shared evenly with the parts that are still to come."""
        self.part_ends = math.inf
        self.part_ends = time.monotonic() + self.left_s / num_left

    @contextmanager
    def passes(self, name: str, detail: str = "") -> Iterator[None]:
        self.progress(f"{name} {detail}".strip())
        start = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    @property
    def left_s(self) -> float:
        ends = min(self.started + self.limit_s, self.part_ends)
        return max(0.05, ends - time.monotonic())


@dataclass(frozen=True, slots=True, eq=False)
class _Recomputed:
    """The graph under one recompute policy, its joint rules, and one prepared graph per layer
    class."""

    remat: Remat
    graph: Graph
    table: RuleTable
    classes: tuple[int, ...]
    prepared: Mapping[int, PreparedStage]


def make_plan(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    budget_bytes: float | None = None,
    options: SearchOptions = SearchOptions(),
    progress: Progress = lambda _: None,
) -> ParallelPlan:
    """The plan that simulates best. graph: at the shape of one microbatch.

    budget_bytes: per device; by default options.budget_fraction of the device's memory.
    Raises NoFeasiblePlan where nothing fits, OptionError where pins cannot be honoured.
    """
    clock = _Clock(options.time_limit_s, progress)
    fingerprint = graph.fingerprint()
    if not graph.layer_names:
        with clock.passes("layers"):
            graph = cluster_layers(graph, options.num_layers)
            fingerprint = graph.fingerprint()
    if budget_bytes is None:
        budget_bytes = min(budgets(cluster, options.budget_fraction))
    _check_pins(graph, cluster, options)
    search = _Search(graph, cluster, num_microbatches, budget_bytes, options, clock)
    policies = _REMAT_ORDER if options.remat is None else (options.remat,)
    outcomes: list[tuple[_Recomputed, list[Candidate]]] = []
    failures: list[NoFeasiblePlan] = []
    notes: list[str] = []
    for number, remat in enumerate(policies):
        clock.begin_part(len(policies) - number)
        try:
            outcomes.append(search.run(remat))
        except NoFeasiblePlan as error:
            _LOG.info("remat %s: %s", remat, error)
            failures.append(error)
            notes.append(f"remat {remat} did not fit: {error}")
            continue
        best = outcomes[-1][1][0]
        notes.append(f"remat {remat}: {best.step_s * 1e3:.2f} ms per step")
        if not any(stage.tight for stage in best.stages):
            break  # memory costs nothing here: to recompute more would
    if not outcomes:
        raise failures[-1]
    recomputed, candidates = min(outcomes, key=lambda outcome: outcome[1][0].step_s)
    return search.plan(fingerprint, recomputed, candidates, notes if len(notes) > 1 else ())


def _check_pins(graph: Graph, cluster: Cluster, options: SearchOptions) -> None:
    """OptionError for a pin that no plan of this graph on this cluster can honour."""
    most = min(len(graph.layer_names), cluster.num_devices)
    if options.num_stages is not None and options.num_stages > most:
        raise OptionError(
            f"num_stages is at most {most}, as the model has {len(graph.layer_names)} "
            f"layers and the "
            f"cluster {cluster.num_devices} devices: got {options.num_stages}"
        )
    known = sorted({i.owner for i in graph.inputs_of(InputKind.PARAMETER)})
    for name in options.placements:
        if name not in known:
            close = " or ".join(difflib.get_close_matches(name, known, n=3) or known[:3])
            raise OptionError(
                f"placements pins {name!r}, which is no parameter: did you mean {close}?"
            )


class _Search:
    """One call of make_plan."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        num_microbatches: int,
        budget_bytes: float,
        options: SearchOptions,
        clock: _Clock,
    ) -> None:
        self.graph, self.cluster = graph, cluster
        self.num_microbatches, self.budget_bytes = num_microbatches, budget_bytes
        self.options, self.clock = options, clock
        self.submeshes, self.views = allowed_views(cluster, options)
        self.costs: dict[LogicalMesh, MeshCosts] = {}

    def mesh_costs(self, mesh: LogicalMesh) -> MeshCosts:
        if mesh not in self.costs:
            self.costs[mesh] = MeshCosts(self.cluster, mesh, self.options.optimizer)
        return self.costs[mesh]

    # ---- passes

    def run(self, remat: Remat) -> tuple[_Recomputed, list[Candidate]]:
        with self.clock.passes("recompute", remat):
            recomputed = self.recompute(remat)
        cuts = self.stage_cuts(recomputed)
        candidates: list[Candidate] = []
        failures: list[NoFeasiblePlan] = []
        for cut in cuts:
            if candidates and self.clock.left_s < 1.0:
                break
            try:
                candidates.append(self.solve_cut(recomputed, cut))
            except NoFeasiblePlan as error:
                failures.append(error)
        if not candidates:
            raise failures[0]
        candidates.sort(key=lambda c: c.step_s)
        if any(s.gap > self.options.target_gap for s in candidates[0].stages):
            winner = candidates[0]
            views = tuple((stage.mesh,) for stage in winner.stages)
            proven = self.solve_cut(recomputed, replace(winner.cut, views=views), proven=True)
            candidates[0] = min(proven, winner, key=lambda c: c.step_s)
            candidates.sort(key=lambda c: c.step_s)
        return recomputed, candidates

    def recompute(self, remat: Remat) -> _Recomputed:
        classes = layer_classes(self.graph)
        graph = apply_recompute(self.graph, remat)
        table = RuleTable(graph)
        prepared: dict[int, PreparedStage] = {}
        for layer, kind in enumerate(classes):
            if kind not in prepared:
                prepared[kind] = prepare_stage(stage_graph(graph, layer, layer), table.dims)
        return _Recomputed(remat, graph, table, classes, prepared)

    def stage_cuts(self, recomputed: _Recomputed) -> list[Cut]:
        """The best stage cut for each number of stages, the fastest first."""
        num_layers = len(self.graph.layer_names)
        if self._only_one_stage(num_layers):
            submesh = self.submeshes[-1]
            return [Cut((0,), (submesh,), (self.views[submesh],), 0.0)]
        with self.clock.passes("layer points"):
            points = {
                view: self._points(recomputed, view)
                for submesh in self.submeshes
                for view in self.views[submesh]
            }
        with self.clock.passes("stage cut"):
            return self._inter_op(recomputed, points)

    def _only_one_stage(self, num_layers: int) -> bool:
        whole = self.submeshes[-1].num_devices == self.cluster.num_devices
        pinned = self.options.num_stages == 1
        return whole and (pinned or num_layers == 1 or self.cluster.num_devices == 1)

    def _points(self, recomputed: _Recomputed, view: LogicalMesh) -> list[tuple[Point, ...]]:
        """Points of each layer on one view; equal layers are solved once."""
        context = StageContext(self.num_microbatches)
        by_class: dict[int, tuple[Point, ...]] = {}
        for kind, stage in recomputed.prepared.items():
            by_class[kind] = layer_points(
                stage.graph,
                stage.table,
                self.mesh_costs(view),
                context,
                prices=(0.0,),
                time_limit_s=self.clock.left_s,
            )
        flight = self._max_in_flight()
        need = sum(
            by_class[kind][0].standing_bytes + flight * by_class[kind][0].saved_bytes
            for kind in recomputed.classes
        ) + max(p[0].transient_bytes for p in by_class.values())
        if need > self.budget_bytes:  # memory may bind somewhere: the whole frontier
            for kind, stage in recomputed.prepared.items():
                self.clock.progress(f"layer points {view}, layer class {kind}")
                by_class[kind] = layer_points(
                    stage.graph,
                    stage.table,
                    self.mesh_costs(view),
                    context,
                    time_limit_s=self.clock.left_s,
                )
        return [by_class[kind] for kind in recomputed.classes]

    def _max_in_flight(self) -> int:
        limit = self.options.num_stages or len(self.graph.layer_names)
        return in_flight_count(self.options.schedule, limit, self.num_microbatches)

    def _inter_op(
        self, recomputed: _Recomputed, points: Mapping[LogicalMesh, list[tuple[Point, ...]]]
    ) -> list[Cut]:
        num_layers = len(self.graph.layer_names)
        limit = min(num_layers, self.cluster.num_devices, self.options.num_stages or num_layers)
        flights = [
            in_flight_count(self.options.schedule, s + 1, self.num_microbatches)
            for s in range(limit)
        ]
        rows = sorted(set(flights))
        tables = {
            view: stage_table(layers, rows, self.budget_bytes) for view, layers in points.items()
        }
        choices = [(s, v) for s in self.submeshes for v in self.views[s]]
        seconds = np.stack([tables[v] for _, v in choices], axis=-1)
        crossing = boundary_bytes(recomputed.graph)
        transfers = np.array(
            [
                [
                    self.mesh_costs(v).receive_seconds(b / s.num_devices) if b else 0.0
                    for s, v in choices
                ]
                for b in crossing
            ]
        )
        problem = InterOpProblem(
            num_layers=num_layers,
            num_devices=tuple(group.num_devices for group in self.cluster.groups),
            submesh_devices=tuple(s.num_devices for s, _ in choices),
            submesh_groups=tuple(s.group for s, _ in choices),
            num_microbatches=self.num_microbatches,
            stage_seconds=seconds,
            transfer_seconds=transfers,
            in_flight=tuple(rows.index(f) + 1 for f in flights),
            max_stages=limit,
        )
        tight = any(len(frontier) > 1 for layers in points.values() for frontier in layers)
        margin = _WORTH_SOLVING_TIGHT if tight else _WORTH_SOLVING
        pinned = self.options.num_stages
        counts = [pinned] if pinned else range(1, limit + 1)
        cuts: list[Cut] = []
        failures: list[NoFeasiblePlan] = []
        for count in counts:
            try:
                found = dp.solve(problem.with_stages(count))
            except NoFeasiblePlan as error:
                failures.append(error)
                continue
            cuts.append(self._cut(found, choices, seconds, margin))
        if not cuts:
            raise failures[0]
        cuts.sort(key=lambda c: c.seconds)
        worth = [c for c in cuts if c.seconds <= margin * cuts[0].seconds]
        return worth[: self.options.candidates]

    def _cut(
        self,
        found: InterOpSolution,
        choices: Sequence[tuple[Submesh, LogicalMesh]],
        seconds: np.ndarray,
        margin: float,
    ) -> Cut:
        """The two best views of each stage's submesh, best first; all where placements are pinned,
        as the tables know nothing of pins."""
        views = []
        most = None if self.options.placements else 2
        for stage in found.stages:
            submesh = choices[stage.submesh][0]
            row = stage.in_flight - 1
            ranked = sorted(
                (float(seconds[row, stage.first_layer, stage.last_layer, m]), m)
                for m, (s, _) in enumerate(choices)
                if s == submesh
            )
            limit = np.inf if self.options.placements else margin * ranked[0][0]
            views.append(
                tuple(choices[m][1] for t, m in ranked[:most] if np.isfinite(t) and t <= limit)
            )
        return Cut(
            tuple(s.first_layer for s in found.stages),
            tuple(choices[s.submesh][0] for s in found.stages),
            tuple(views),
            found.seconds,
        )

    def solve_cut(self, recomputed: _Recomputed, cut: Cut, *, proven: bool = False) -> Candidate:
        """Solution of every stage of a cut, on its best views, and the simulated step. proven: a
        gap above the target goes to the MIP backend."""
        label = f"{len(cut.first_layers)} stage(s)"
        with self.clock.passes("exact stages", label):
            graphs = cut_stages(recomputed.graph, cut.first_layers)
            owners = parameter_owners(graphs)
            stages = tuple(
                self._solve_stage(
                    prepare_stage(graph, recomputed.table.dims),
                    cut.views[index],
                    index,
                    len(graphs),
                    frozenset(o for o, stage in owners.items() if stage == index),
                    proven,
                )
                for index, graph in enumerate(graphs)
            )
        with self.clock.passes("simulate", label):
            timeline = simulate_stages(graphs, stages, self.options, self.num_microbatches)
        return Candidate(cut, stages, timeline, timeline.step_s)

    def _solve_stage(
        self,
        stage: PreparedStage,
        views: Sequence[LogicalMesh],
        index: int,
        num_stages: int,
        owned: frozenset[str],
        proven: bool,
    ) -> StageSolution:
        flight = in_flight_count(self.options.schedule, num_stages - index, self.num_microbatches)
        context = StageContext(self.num_microbatches, flight, owned, self.options.placements)
        limit_s = self.clock.left_s * (_PROOF_SHARE if proven else 1.0)
        options = SolverOptions(self.options.solver, limit_s, self.options.target_gap, proven)
        best: StageSolution | None = None
        failures: list[NoFeasiblePlan] = []
        refused: list[OptionError] = []
        for view in views:
            try:
                found = solve_stage(
                    stage.graph,
                    stage.table,
                    self.mesh_costs(view),
                    context,
                    budget_bytes=self.budget_bytes,
                    options=options,
                )
            except NoFeasiblePlan as error:
                failures.append(error)
                continue
            except OptionError as error:  # a pin that this view cannot honour
                refused.append(error)
                continue
            if best is None or found.seconds < best.seconds:
                best = found
        if best is None and not failures:
            raise refused[0]
        if best is None:
            raise NoFeasiblePlan(
                f"stage {index} of {num_stages}: {failures[0]}",
                least_bytes=failures[0].least_bytes,
            )
        return best

    # ---- the answer

    def plan(
        self,
        fingerprint: str,
        recomputed: _Recomputed,
        candidates: Sequence[Candidate],
        notes: Sequence[str],
    ) -> ParallelPlan:
        best = candidates[0]
        graphs = cut_stages(recomputed.graph, best.cut.first_layers)
        devices = place_stages(best.cut.submeshes, self.cluster)
        bounds = [*best.cut.first_layers[1:], len(self.graph.layer_names)]
        stages = tuple(
            stage_plan(
                prepare_stage(graph, recomputed.table.dims),
                solution,
                (best.cut.first_layers[i], bounds[i] - 1),
                devices[i],
            )
            for i, (graph, solution) in enumerate(zip(graphs, best.stages, strict=True))
        )
        record = SearchRecord(
            seconds={k: round(v, 4) for k, v in self.clock.seconds.items()},
            objective_s=sum(s.seconds for s in best.stages),
            bound_s=sum(s.bound for s in best.stages),
            notes=tuple(notes),
            candidates=tuple(describe(c) for c in candidates),
        )
        return ParallelPlan(
            graph=fingerprint,
            cluster_text=str(self.cluster),
            cluster=self.cluster.to_dict(),
            num_microbatches=self.num_microbatches,
            schedule=self.options.schedule,
            remat=recomputed.remat,
            layer_names=self.graph.layer_names,
            stages=stages,
            step_s=best.step_s,
            bubble=best.timeline.bubble_fraction,
            budget_bytes=self.budget_bytes,
            search=record,
            fallbacks=dict(sorted(Counter(recomputed.table.fallbacks.values()).items())),
            rules=recomputed.table.unwritten(),
        )
