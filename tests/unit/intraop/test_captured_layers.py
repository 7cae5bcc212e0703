"""Every solver on the programs of captured graphs: the same optimum, and how long it took."""

from __future__ import annotations

import pytest

from autopar.graph.program import Graph
from autopar.intraop.build import build_problem
from autopar.intraop.problem import IntraOpProblem, IntraOpSolution
from autopar.intraop.solver import Solver, solve
from autopar.intraop.stage_problem import StageContext
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import stage_graph
from autopar.plan import Remat
from autopar.sharding.registry import RuleTable
from tests.unit.intraop.stages import costs_of, gpt2_graph, llama_graph, stage_of

ALL = (Solver.DUAL, Solver.HIGHS, Solver.CBC, Solver.CP_SAT)
_CBC_LIMIT_S = 20.0


def problem_of(stage: PreparedStage, mesh: tuple[int, ...]) -> IntraOpProblem:
    return build_problem(stage.graph, stage.table, costs_of(mesh), StageContext(4)).problem


def block_of(graph: Graph) -> PreparedStage:
    """The second layer: a block with neighbours on both sides."""
    graph = apply_recompute(graph, Remat.SELECTIVE)
    table = RuleTable(graph)
    return prepare_stage(stage_graph(graph, 1, 1), table.dims)


def solve_all(
    problem: IntraOpProblem, solvers: tuple[Solver, ...], limit_s: float = 60.0
) -> dict[Solver, IntraOpSolution]:
    return {
        solver: solve(problem, solver=solver, target_gap=0.0, time_limit_s=limit_s)
        for solver in solvers
    }


def print_table(label: str, problem: IntraOpProblem, found: dict[Solver, IntraOpSolution]) -> None:
    entries = sum(r_uv.size for r_uv in problem.edge_seconds)
    times = "  ".join(f"{solver} {f.wall_s:.3f} s" for solver, f in found.items())
    print(f"{label:24} {len(problem.node_names):5} nodes {entries:8} edge entries  {times}")


def check_agreement(found: dict[Solver, IntraOpSolution]) -> None:
    """One optimum; a solver that ran out of time has a bound below it and a value above it."""
    optimum = found[Solver.DUAL].seconds
    assert found[Solver.DUAL].optimal
    for solver, solution in found.items():
        if solution.optimal:
            assert solution.seconds == pytest.approx(optimum, rel=1e-6), solver
        assert solution.bound <= optimum * (1 + 1e-6), solver
        assert solution.seconds >= optimum * (1 - 1e-6), solver


@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=str)
def test_a_captured_mlp(mesh: tuple[int, ...]) -> None:
    problem = problem_of(stage_of("mlp"), mesh)
    found = solve_all(problem, ALL)
    print_table(f"mlp {mesh}", problem, found)
    check_agreement(found)
    assert all(solution.optimal for solution in found.values())


def test_captured_attention() -> None:
    problem = problem_of(stage_of("attention"), (2,))
    found = solve_all(problem, ALL, 10.0)
    print_table("attention (2,)", problem, found)
    check_agreement(found)
    assert found[Solver.HIGHS].optimal


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_real_block(name: str) -> None:
    """GPT-2 124M at batch 8 x 1024 and Llama's 7B block at 4 x 1024."""
    stage = block_of({"gpt2": gpt2_graph, "llama": llama_graph}[name]())
    problem = problem_of(stage, (8,))
    found = solve_all(problem, (Solver.DUAL, Solver.HIGHS))
    found |= solve_all(problem, (Solver.CBC,), _CBC_LIMIT_S)
    print_table(f"{name} block (8,)", problem, found)
    check_agreement(found)
    assert found[Solver.HIGHS].optimal
