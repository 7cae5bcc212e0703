"""Small budgeted programs are solved to the optimum without any MIP solver."""

from __future__ import annotations

import time

import numpy as np
import pytest

from autopar.intraop.branch import branch, is_small
from autopar.intraop.free import Effort
from autopar.intraop.memory import Earlier, minimise_within_budget
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.solver import solve
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import small_problem


@pytest.mark.parametrize("seed", range(60))
def test_optimum_within_a_budget(seed: int) -> None:
    problem = small_problem(seed, with_budget=True)
    assert is_small(problem)
    optimum = brute_force(problem).optimum(problem.budget_bytes)
    if not np.isfinite(optimum):
        return
    found = solve(problem, target_gap=0.0, fallback=False, branching=True)
    assert found.bound <= optimum * (1 + 1e-9)
    assert found.seconds == pytest.approx(optimum, rel=1e-6)


def few_large_tensors() -> IntraOpProblem:
    """Two nodes hold the bytes and only one of them can be fast: the bound is nearly both half."""
    seconds = (np.array([0.0, 4.0]), np.array([0.0, 3.0]), np.array([1.0, 2.0]))
    nbytes = (np.array([10.0, 0.0]), np.array([10.0, 0.0]), np.array([1.0, 0.0]))
    zero = np.zeros((2, 2))
    edges = ((0, 1), (1, 2))
    return IntraOpProblem(("a", "b", "c"), seconds, nbytes, edges, (zero, zero), 19.0)


def test_parts_close_a_gap_that_no_multiplier_closes() -> None:
    problem, earlier = few_large_tensors(), Earlier()
    effort = Effort(deadline=time.monotonic() + 10.0, target_gap=0.0, allow_mip=False)
    known = minimise_within_budget(problem, effort=effort, earlier=earlier)
    assert known.best is not None and known.bound < 0.9 * known.best.seconds
    found = branch(problem, known, earlier, effort, 0.0)
    assert found.best is not None
    assert found.best.seconds == found.bound == 4.0


def test_a_deadline_leaves_a_valid_bound() -> None:
    problem, earlier = few_large_tensors(), Earlier()
    effort = Effort(deadline=time.monotonic() + 10.0, target_gap=0.0, allow_mip=False)
    known = minimise_within_budget(problem, effort=effort, earlier=earlier)
    late = Effort(deadline=time.monotonic() - 1.0, target_gap=0.0, allow_mip=False)
    assert branch(problem, known, earlier, late, 0.0) == known
