"""The cost tables group and mask, and their bound never exceeds what it bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autopar.interop.dp import solve
from autopar.interop.problem import InterOpProblem
from autopar.interop.tables import CostTables


def problem(seed: int = 0) -> InterOpProblem:
    rng = np.random.default_rng(seed)
    transfer = rng.random((4, 3))
    transfer[0] = 0
    return InterOpProblem(
        num_layers=4,
        num_devices=(8,),
        submesh_devices=(4, 2, 4),
        num_microbatches=1,
        stage_seconds=1 + rng.random((2, 4, 4, 3)),
        transfer_seconds=transfer,
        in_flight=(1, 2, 2, 2),
    )


def test_equal_submeshes_are_one_size_and_devices_count_in_units() -> None:
    made, tables = problem(), CostTables.of(problem())
    assert tables.sizes == ((0, 2), (0, 4))
    assert (tables.steps.tolist(), tables.all_used) == ([1, 2], 4)
    c_m = made.row(2)[1, 2] + made.transfer_seconds[1]
    r = tables.rows[1]  # the second stage from the end
    assert tables.cost[1, 1, 1, r] == min(c_m[0], c_m[2])
    assert tables.choice[1, 1, 1, r] == (0 if c_m[0] < c_m[2] else 2)
    assert tables.cost[1, 0, 1, r] == c_m[1]
    assert np.isinf(tables.cost[3, :, 1]).all()  # layers 3..4 do not exist
    assert tables.by_end[3, 1, 1] == tables.cost[1, 1, 1].min()
    assert CostTables.of(replace(made, num_devices=(7,))).all_used == -1


def test_candidates_lie_within_bounds() -> None:
    tables = CostTables.of(problem())
    every, some = tables.candidates(0.0, math.inf), tables.candidates(1.5, 2.0)
    assert (np.diff(every) > 0).all()
    assert some.tolist() == [t for t in every if 1.5 < t <= 2.0]


def test_states_of_two_groups_do_not_mix() -> None:
    """Every sum of sizes within both groups has its own valid state; no other sum reaches one."""
    two = replace(
        problem(), num_devices=(8, 6), submesh_devices=(4, 2, 6), submesh_groups=(0, 1, 1)
    )
    tables = CostTables.of(two)
    assert tables.sizes == ((0, 4), (1, 2), (1, 6))
    first, second, third = tables.steps.tolist()
    states = {
        a * first + b * second + c * third
        for a, b, c in product(range(3), range(4), range(2))
        if b + 3 * c <= 3
    }
    assert set(np.flatnonzero(tables.valid)) == states
    assert len(states) == 3 * 4 and max(states) == tables.all_used
    for state, step in product(states, (first, second, third)):
        beyond = state + step not in states
        assert beyond or tables.valid[state + step]


@pytest.mark.parametrize("seed", range(10))
def test_prefix_bound_is_a_bound(seed: int) -> None:
    made = problem(seed)
    bound = CostTables.of(made).prefix_sums(math.inf)
    assert bound[0, 0] == 0
    assert bound[-1, -1] <= solve(made).seconds * (1 + 1e-12)  # one microbatch: the step is the sum
    one_row = replace(made, in_flight=(2, 2, 2, 2))
    tight = CostTables.of(one_row).prefix_sums(math.inf)
    assert tight[-1, -1] == pytest.approx(solve(one_row).seconds)
    assert np.isinf(CostTables.of(made).prefix_sums(0.5)[1:]).all()


@pytest.mark.parametrize("seed", range(10))
def test_too_few_devices_means_infeasible(seed: int) -> None:
    tables = CostTables.of(problem(seed))
    bounds = np.linspace(0.5, 3.0, 11)
    for t_max, need in zip(bounds, tables.fewest_devices(bounds), strict=True):
        if np.isfinite(tables.prefix_sums(float(t_max))[-1, -1]):
            assert need <= 8
