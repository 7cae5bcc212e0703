"""Plans that are told: cut, views, recomputation and microbatches are given, and the stages'
integer programs may be restricted. What they cost is what the search says of its own plans: the
same cost model, the same solver, the same simulated schedule. The search itself takes no part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate import MeshCosts
from autopar.graph.program import Graph
from autopar.graph.repeat import whole_graph
from autopar.intraop.build import build_problem
from autopar.intraop.compose import without_boundary
from autopar.intraop.fold import fold_problem
from autopar.intraop.stage import SolverOptions, StageProgram, StageSolution
from autopar.intraop.stage_problem import Choice, Node, StageContext, StageProblem
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.stages import cut_stages, parameter_owners
from autopar.mesh import LogicalMesh
from autopar.options import runs_compiled
from autopar.plan import Remat
from autopar.search.program import Program
from autopar.search.unfold import renamed, same_structure
from autopar.search.window import Window, write_window
from autopar.search.workload import Workload
from autopar.sharding.registry import RuleTable
from cost_models import Cluster

Keep = Callable[[Node, Choice], bool]
Restriction = Callable[[PreparedStage, LogicalMesh], Keep]

_ANY_GAP = 0.999  # of a solve that is asked for its bound


@dataclass(frozen=True, slots=True, eq=False)
class ToldStages:
    """The stages of a cut before anything is chosen. keys: equal for stages that are equal but for
    names."""

    graphs: tuple[Graph, ...]
    prepared: tuple[PreparedStage, ...]
    owned: tuple[frozenset[str], ...]
    window: Window | None
    keys: tuple[str, ...]


class Forced:
    """Solves told stages; remembers what it has solved. budget_bytes: per device.

    folded: equal layers of a stage are folded as in the search; else every layer is written out.
    """

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        budget_bytes: float,
        *,
        folded: bool,
        solver: SolverOptions = SolverOptions(),
    ) -> None:
        self.workload, self.cluster, self.budget_bytes = workload, cluster, budget_bytes
        self.folded, self.solver = folded, solver
        self.compiled = runs_compiled(cluster)
        self.num_solves = 0
        self.remembered: dict[Any, Any] = {}  # by whoever asks
        self._programs: dict[int, Program] = {}
        self._costs: dict[LogicalMesh, MeshCosts] = {}
        self._cuts: dict[Any, ToldStages] = {}
        self._known: dict[Any, tuple[Graph, StageSolution | None]] = {}
        self._least_s: dict[Any, float] = {}

    def program(self, num_microbatches: int) -> Program:
        if num_microbatches not in self._programs:
            folded = self.workload.at(num_microbatches)
            self._programs[num_microbatches] = Program(
                folded, num_microbatches, compiled=self.compiled
            )
        return self._programs[num_microbatches]

    def cut(
        self,
        num_microbatches: int,
        first_layers: tuple[int, ...],
        policies: tuple[Remat, ...],
        breaks: frozenset[int] = frozenset(),
    ) -> ToldStages:
        """policies: of each layer of the model. breaks: as of `write_window`."""
        key = (num_microbatches, first_layers, policies, breaks)
        if key not in self._cuts:
            self._cuts[key] = self._cut(*key)
        return self._cuts[key]

    def _cut(
        self,
        num_microbatches: int,
        first_layers: tuple[int, ...],
        policies: tuple[Remat, ...],
        breaks: frozenset[int],
    ) -> ToldStages:
        program = self.program(num_microbatches)
        window = None
        if self.folded:
            window = write_window(
                program.folded, program.kind_of_written, first_layers, policies, breaks=breaks
            )
            recomputed = program.recomputed(window.graph, window.policies)
            first_layers = window.first_layers
        else:
            recomputed = program.recomputed(whole_graph(program.folded), policies)
        dims = RuleTable(recomputed).dims
        graphs = cut_stages(recomputed, first_layers)
        owners = parameter_owners(graphs)
        owned = tuple(
            frozenset(o for o, holder in owners.items() if holder == index)
            for index in range(len(graphs))
        )
        prepared = tuple(prepare_stage(graph, dims) for graph in graphs)
        keys = []
        for index, stage in enumerate(prepared):
            first = min((op.layer for op in stage.graph.operators), default=0)
            folds = () if window is None else window.folds(index)
            text = (
                f"{same_structure(stage.graph)}\n"
                f"{[i.owner in owned[index] for i in stage.graph.inputs]}\n"
                f"{[(f.layer - first, f.count) for f in folds]}\n{num_microbatches}"
            )
            keys.append(hashlib.sha256(text.encode()).hexdigest())
        return ToldStages(graphs, prepared, owned, window, tuple(keys))

    def solve(
        self,
        told: ToldStages,
        index: int,
        view: LogicalMesh,
        num_microbatches: int,
        flight: int,
        restriction: Restriction | None = None,
        name: str = "",
        *,
        within_budget: bool = True,
    ) -> StageSolution | None:
        """One stage, None where it does not fit. flight: microbatches that it has room for. name:
        of the restriction. within_budget: False for the fastest one, whatever its bytes."""
        stage = told.prepared[index]
        key = (told.keys[index], view, name)
        if key not in self._known:
            free = self._solved(told, index, view, num_microbatches, flight, None, restriction)
            self._known[key] = (stage.graph, free)
        graph, found = self._known[key]
        if found is None:
            return None
        prediction = replace(found.prediction, in_flight=flight)
        if within_budget and prediction.peak_bytes > self.budget_bytes:
            key = (*key, flight)
            if key not in self._known:
                tight = self._solved(
                    told, index, view, num_microbatches, flight, self.budget_bytes, restriction
                )
                self._known[key] = (stage.graph, tight)
            graph, found = self._known[key]
            if found is None:
                return None
            prediction = found.prediction
        return replace(renamed(found, graph, stage.graph), prediction=prediction)

    def least_seconds(
        self, told: ToldStages, index: int, view: LogicalMesh, num_microbatches: int, flight: int
    ) -> float:
        """No solution of a stage within the budget takes fewer, as few sweeps prove: forward and
        backward of a microbatch with its share of what comes once per step, nothing received."""
        key = (told.keys[index], view, flight)
        if key not in self._least_s:
            stage, built, costs, context = self._built(told, index, view, num_microbatches, flight)
            built = replace(built, problem=without_boundary(built))
            program = StageProgram(stage.graph, built, costs, context)
            options = replace(self.solver, target_gap=_ANY_GAP, fallback=False)
            try:
                least_s = program.solved(budget_bytes=self.budget_bytes, options=options).bound
            except NoFeasiblePlan:  # found none: no proof that there is none
                least_s = 0.0
            self._least_s[key] = least_s
        return self._least_s[key]

    def _solved(
        self,
        told: ToldStages,
        index: int,
        view: LogicalMesh,
        num_microbatches: int,
        flight: int,
        budget: float | None,
        restriction: Restriction | None,
    ) -> StageSolution | None:
        self.num_solves += 1
        try:
            stage, built, costs, context = self._built(told, index, view, num_microbatches, flight)
            if restriction is not None:
                built = restricted(built, restriction(stage, view))
            program = StageProgram(stage.graph, built, costs, context)
            return program.solved(budget_bytes=budget, options=self.solver)
        except NoFeasiblePlan:
            return None

    def _built(
        self, told: ToldStages, index: int, view: LogicalMesh, num_microbatches: int, flight: int
    ) -> tuple[PreparedStage, StageProblem, MeshCosts, StageContext]:
        stage = told.prepared[index]
        folds = () if told.window is None else told.window.folds(index)
        context = StageContext(
            num_microbatches, flight, told.owned[index], folds=folds, compiled=self.compiled
        )
        costs = self._costs.setdefault(view, MeshCosts(self.cluster, view))
        built = build_problem(stage.graph, stage.table, costs, context)
        if folds:
            built = fold_problem(built, stage.graph, folds)
        return stage, built, costs, context


def restricted(built: StageProblem, keep: Keep) -> StageProblem:
    """The program with the choices that are kept. NoFeasiblePlan where a node is left without."""
    problem = built.problem
    kept = []
    for node in built.nodes:
        picks = [i for i, choice in enumerate(node.choices) if keep(node, choice)]
        if not picks:
            raise NoFeasiblePlan(f"{node.kind} {node.name} has no choice that is allowed")
        kept.append(np.array(picks))
    matrices: dict[Any, np.ndarray[Any, np.dtype[np.float64]]] = {}  # equal ones stay one object

    def cut(matrix: np.ndarray[Any, np.dtype[np.float64]], u: int, v: int) -> Any:
        key = (id(matrix), kept[u].tobytes(), kept[v].tobytes())
        if key not in matrices:
            matrices[key] = np.ascontiguousarray(matrix[np.ix_(kept[u], kept[v])])
        return matrices[key]

    edges = zip(problem.edges, problem.edge_seconds, strict=True)

    def chosen(node: Node, picks: np.ndarray[Any, Any]) -> Node:
        return replace(node, choices=tuple(node.choices[i] for i in picks))

    return replace(
        built,
        problem=replace(
            problem,
            node_seconds=tuple(s[k] for s, k in zip(problem.node_seconds, kept, strict=True)),
            node_bytes=tuple(b[k] for b, k in zip(problem.node_bytes, kept, strict=True)),
            edge_seconds=tuple(cut(matrix, u, v) for (u, v), matrix in edges),
        ),
        nodes=tuple(map(chosen, built.nodes, kept)),
        twins=tuple((chosen(node, kept[first]), first) for node, first in built.twins),
    )


def table_text(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def header_text(title: str, command: str, facts: Mapping[str, object]) -> str:
    """The head of a result: where it was measured."""
    lines = [f"# {title}", "", f"- command: `{command}`"]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in facts.items())]) + "\n"
