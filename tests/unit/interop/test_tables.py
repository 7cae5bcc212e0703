"""The cost tables group and mask, and their bound never exceeds what it bounds."""

from __future__ import annotations

import math
from dataclasses import replace

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
        num_devices=8,
        submesh_devices=(4, 2, 4),
        num_microbatches=1,
        stage_seconds=1 + rng.random((2, 4, 4, 3)),
        transfer_seconds=transfer,
        in_flight=(1, 2, 2, 2),
    )


def test_equal_submeshes_are_one_group_and_devices_count_in_units() -> None:
    made, tables = problem(), CostTables.of(problem())
    assert (tables.unit_counts, tables.units) == ((1, 2), 4)
    c_m = made.stage_seconds[1, 1, 2] + made.transfer_seconds[1]
    assert tables.cost[2][1, 1, 1] == min(c_m[0], c_m[2])
    assert tables.cost[2][0, 1, 1] == c_m[1]
    assert np.isinf(tables.cost[1][:, 1, 3]).all()  # layers 3..4 do not exist
    assert (np.diff(tables.candidates) > 0).all()
    assert CostTables.of(replace(made, num_devices=7)).units == -1


@pytest.mark.parametrize("seed", range(10))
def test_prefix_bound_is_a_bound(seed: int) -> None:
    made = problem(seed)
    bound = CostTables.of(made).prefix_bound(math.inf)
    assert bound[0, 0] == 0
    assert bound[-1, -1] <= solve(made).seconds * (1 + 1e-12)  # one microbatch: the step is the sum
    one_row = replace(made, in_flight=(2, 2, 2, 2))
    tight = CostTables.of(one_row).prefix_bound(math.inf)
    assert tight[-1, -1] == pytest.approx(solve(one_row).seconds)
    assert np.isinf(CostTables.of(made).prefix_bound(0.5)[1:]).all()
