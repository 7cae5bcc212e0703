"""Every solver against brute force on 200 small programs, with and without budgets."""

from __future__ import annotations

import time

import numpy as np
import pytest

from autopar.errors import NoFeasiblePlan, OptionError, SolverError
from autopar.intraop.problem import IntraOpProblem, IntraOpSolution
from autopar.intraop.solver import Solver, solve
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import dense_problem, layered_problem, small_problem

NUM_PROBLEMS = 200
SEEDS_PER_TEST = 20
BLOCKS = range(0, NUM_PROBLEMS, SEEDS_PER_TEST)
BACKENDS = (Solver.HIGHS, Solver.CP_SAT, Solver.CBC)


def check_against_oracle(
    problem: IntraOpProblem, solver: Solver, target_gap: float, label: str
) -> IntraOpSolution:
    """seconds within the stated gap of brute force, bound below it, choice consistent with its
    numbers.
    """
    optimum = brute_force(problem).optimum(problem.budget_bytes)
    found = solve(problem, solver=solver, target_gap=target_gap, time_limit_s=30.0)
    assert found.seconds == pytest.approx(problem.seconds(found.choice)), label
    assert problem.fits(problem.bytes(found.choice)), label
    assert found.bound <= optimum * (1 + 1e-9), f"{label}: bound above the optimum"
    assert found.seconds >= optimum * (1 - 1e-9), label
    assert found.gap <= target_gap + 1e-6, label
    assert found.seconds <= found.bound * (1 + found.gap) * (1 + 1e-9), label
    if target_gap == 0.0:
        assert found.seconds == pytest.approx(optimum, rel=1e-7), label
        assert found.optimal, label
    return found


@pytest.mark.parametrize("first", BLOCKS)
def test_dual_without_budget_equals_brute_force(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        problem = small_problem(seed)
        found = solve(problem)
        optimum = brute_force(problem).optimum(None)
        assert found.seconds == pytest.approx(optimum, rel=1e-12), f"seed {seed}"
        assert found.bound <= optimum * (1 + 1e-12), f"seed {seed}"
        assert found.optimal


@pytest.mark.parametrize("first", BLOCKS)
@pytest.mark.parametrize("target_gap", [0.3, 0.01, 0.0])
def test_dual_with_budget_keeps_its_stated_gap(first: int, target_gap: float) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        problem = small_problem(seed, with_budget=True)
        check_or_infeasible(problem, Solver.DUAL, target_gap, f"seed {seed}")


@pytest.mark.parametrize("first", BLOCKS)
@pytest.mark.parametrize("solver", BACKENDS)
def test_backend_equals_brute_force(first: int, solver: Solver) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        check_or_infeasible(small_problem(seed), solver, 0.0, f"seed {seed}")
        budgeted = small_problem(seed, with_budget=True)
        check_or_infeasible(budgeted, solver, 0.0, f"seed {seed} budget")


def check_or_infeasible(
    problem: IntraOpProblem, solver: Solver, target_gap: float, label: str
) -> None:
    oracle = brute_force(problem)
    if np.isfinite(oracle.optimum(problem.budget_bytes)):
        check_against_oracle(problem, solver, target_gap, label)
        return
    with pytest.raises(NoFeasiblePlan) as caught:
        solve(problem, solver=solver, target_gap=target_gap)
    least = caught.value.least_bytes
    assert least is not None
    assert least <= oracle.least_bytes() * (1 + 1e-9), label
    if solver is Solver.DUAL:
        assert least == pytest.approx(oracle.least_bytes()), label


@pytest.mark.parametrize("solver", list(Solver))
def test_same_problem_same_choice(solver: Solver) -> None:
    for seed in (2, 5, 11):
        first = solve(small_problem(seed, with_budget=True), solver=solver)
        again = solve(small_problem(seed, with_budget=True), solver=solver)
        assert first.choice == again.choice


@pytest.mark.parametrize("solver", list(Solver))
def test_infeasible_budget_names_what_binds(solver: Solver) -> None:
    gib = 2.0**30
    problem = IntraOpProblem(
        node_names=("embedding", "norm"),
        node_seconds=(np.array([1.0, np.inf]), np.array([1.0, 2.0])),
        node_bytes=(np.array([8 * gib, 1.0]), np.array([2 * gib, 1 * gib])),
        edges=((0, 1),),
        edge_seconds=(np.zeros((2, 2)),),
        budget_bytes=4 * gib,
    )
    with pytest.raises(
        NoFeasiblePlan, match=r"4 GiB.*smallest budget.*9 GiB.*embedding 8 GiB"
    ) as caught:
        solve(problem, solver=solver)
    assert caught.value.least_bytes == 9 * gib
    assert solve(problem.with_budget(9 * gib), solver=solver).choice == (0, 1)


@pytest.mark.parametrize("solver", list(Solver))
def test_forbidden_everywhere_is_infeasible_without_a_budget(solver: Solver) -> None:
    c = (np.zeros(2), np.zeros(2), np.zeros(2))
    differ = np.array([[np.inf, 0.0], [0.0, np.inf]])  # a triangle has no 2-colouring
    problem = IntraOpProblem(("a", "b", "c"), c, c, ((0, 1), (0, 2), (1, 2)), (differ,) * 3)
    with pytest.raises(NoFeasiblePlan, match="forbidden"):
        solve(problem, solver=solver)
    with pytest.raises(NoFeasiblePlan):
        solve(problem.with_budget(1.0), solver=solver)


def test_forbidden_pairs_raise_the_least_bytes() -> None:
    """The two light strategies exclude each other: the smallest fitting budget is above the sum of
    minima.
    """
    m = (np.array([1.0, 10.0]), np.array([1.0, 20.0]))
    r = np.array([[np.inf, 0.0], [0.0, 0.0]])
    problem = IntraOpProblem(("a", "b"), (np.ones(2), np.ones(2)), m, ((0, 1),), (r,), 10.0)
    with pytest.raises(NoFeasiblePlan, match="smallest budget that fits") as caught:
        solve(problem)
    assert caught.value.least_bytes == 11.0
    assert solve(problem.with_budget(11.0)).choice == (1, 0)


def test_empty_problem_and_bad_options() -> None:
    empty = IntraOpProblem((), (), (), (), ())
    assert solve(empty).choice == ()
    with pytest.raises(OptionError, match="time_limit_s"):
        solve(empty, time_limit_s=0.0)
    with pytest.raises(OptionError, match="target_gap"):
        solve(empty, target_gap=1.5)


def test_negative_costs_are_fine() -> None:
    for seed in range(20):
        p = small_problem(seed)
        shifted = IntraOpProblem(
            p.node_names,
            tuple(c_v - 0.5 for c_v in p.node_seconds),
            p.node_bytes,
            p.edges,
            p.edge_seconds,
        )
        optimum = brute_force(shifted).optimum(None)
        assert solve(shifted).seconds == pytest.approx(optimum, abs=1e-12)


def test_large_layered_problem_timing(capsys: pytest.CaptureFixture[str]) -> None:
    problem = layered_problem()
    free = solve(problem)
    least = sum(float(m_v.min()) for m_v in problem.node_bytes)
    tight = solve(problem.with_budget(least + 0.4 * (free.bytes - least)))
    assert free.optimal
    assert tight.gap <= 0.01
    assert tight.bound >= free.bound
    with capsys.disabled():
        n, e = len(problem.node_names), len(problem.edges)
        print(
            f"\n{n} nodes {e} edges: free {free.wall_s:.2f} s, budget {tight.wall_s:.2f} s "
            f"gap {tight.gap:.2%}"
        )


@pytest.mark.parametrize("solver", list(Solver))
def test_time_limit_leaves_an_honest_answer(solver: Solver) -> None:
    """A dense random program that none of them proves in a second."""
    problem = dense_problem(num_nodes=30, num_strategies=6)
    started = time.monotonic()
    try:
        found = solve(problem, solver=solver, time_limit_s=1.0, target_gap=0.0)
    except SolverError as error:
        assert "time limit" in str(error)
    else:
        assert not found.optimal
        assert found.bound < found.seconds == pytest.approx(problem.seconds(found.choice))
        if solver is Solver.DUAL:
            assert found.stats["fallback"] == "highs"
    assert time.monotonic() - started < 10.0
