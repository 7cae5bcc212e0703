"""The multiplier's bound and the primal moves, without any MIP behind them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from autopar.intraop.free import Effort, Worth
from autopar.intraop.improve import Assignment, Neighbourhood
from autopar.intraop.memory import minimise_within_budget
from autopar.intraop.problem import IntraOpProblem, lightest_choice
from autopar.intraop.solver import NotWorth, solve
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import layered_problem, small_problem


def effort() -> Effort:
    return Effort(deadline=time.monotonic() + 20.0, target_gap=1e-3, allow_mip=False)


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_bound_below_optimum_below_primal(first: int) -> None:
    for seed in range(first, first + 20):
        problem = small_problem(seed, with_budget=True)
        optimum = brute_force(problem).optimum(problem.budget_bytes)
        if not np.isfinite(optimum):
            continue
        found = minimise_within_budget(problem, effort=effort())
        assert found.bound <= optimum * (1 + 1e-9), f"seed {seed}"
        assert found.best is not None, f"seed {seed}"
        assert found.best.seconds >= optimum * (1 - 1e-9), f"seed {seed}"
        assert problem.fits(problem.bytes(found.best.choice)), f"seed {seed}"


def test_moves_only_save_and_always_fit() -> None:
    for seed in range(60):
        problem = small_problem(seed, with_budget=True)
        start = Assignment.of(problem, lightest_choice(problem))
        if not np.isfinite(start.seconds):
            continue
        other = Assignment.of(problem, tuple(len(c_v) - 1 for c_v in problem.node_seconds))
        around = Neighbourhood(problem)
        switched = around.switch_parts(start, other)
        moved = around.move_nodes(switched)
        assert moved.seconds <= switched.seconds <= start.seconds
        assert problem.fits(moved.bytes)
        assert around.move_nodes(moved).choice == moved.choice  # no node was passed over


def test_what_is_not_worth_it_ends_early() -> None:
    """Only where no assignment within the budget is as fast as asked."""
    ended = 0
    for seed in range(60):
        problem = small_problem(seed, with_budget=True)
        optimum = brute_force(problem).optimum(problem.budget_bytes)
        if not np.isfinite(optimum) or problem.budget_bytes is None:
            continue
        for share in (0.5, 0.99, 1 + 1e-9, 1.5):
            worth = Worth(share * optimum, problem.budget_bytes)
            try:
                found = solve(problem, target_gap=0.0, worth=worth)
            except NotWorth:
                ended += 1
                assert optimum > worth.seconds
            else:
                assert found.seconds == pytest.approx(optimum)
    assert ended > 10


def test_a_run_of_layers_switches() -> None:
    """Nodes come layer by layer in forward and the other way round in backward: the first layers
    switch whole, though forbidden pairs lie between nodes that have switched and others."""
    apart = np.array([[0.0, np.inf], [np.inf, 0.0]])
    problem = IntraOpProblem(
        node_names=("forward 0", "forward 1", "backward 1", "backward 0"),
        node_seconds=(np.array([2.0, 1.0]),) * 4,
        node_bytes=(np.array([0.0, 1.0]),) * 4,
        edges=((0, 1), (0, 3), (1, 2)),
        edge_seconds=(np.zeros((2, 2)), apart, apart),
        budget_bytes=3.0,
        node_layers=(0, 1, 1, 0),
    )
    light, heavy = (Assignment.of(problem, (s,) * 4) for s in (0, 1))
    switched = Neighbourhood(problem).switch_parts(light, heavy)
    assert switched.choice == (1, 0, 0, 1) and switched.seconds == 6.0


def test_layers_give_a_small_gap() -> None:
    """Many layers are many switches: the walk alone comes within one percent."""
    problem = layered_problem(num_layers=12, nodes_per_layer=40, num_axes_choices=5)
    least = problem.bytes(lightest_choice(problem))
    free_plan = minimise_within_budget(problem.with_budget(1e18), effort=effort()).best
    assert free_plan is not None
    for share in (0.2, 0.5, 0.8):
        tight = problem.with_budget(least + share * (free_plan.bytes - least))
        found = minimise_within_budget(tight, effort=effort())
        assert found.best is not None
        assert found.best.seconds <= found.bound * 1.01
