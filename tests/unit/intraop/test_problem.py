"""A problem is checked at birth."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from autopar.errors import OptionError
from autopar.intraop.problem import IntraOpProblem, IntraOpSolution, least_bytes
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import small_problem

TWO = (np.ones(2), np.ones(2))


def two_nodes(**changes: object) -> IntraOpProblem:
    fields: dict[str, object] = {
        "node_names": ("a", "b"),
        "node_seconds": TWO,
        "node_bytes": TWO,
        "edges": ((0, 1),),
        "edge_seconds": (np.zeros((2, 2)),),
    }
    return IntraOpProblem(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"node_names": ("a",)}, "one cost and one byte vector per node"),
        ({"node_bytes": (np.ones(2), np.ones(3))}, "node b"),
        ({"node_bytes": (np.ones(2), np.array([1.0, -1.0]))}, "finite and >= 0"),
        ({"node_bytes": (np.ones(2), np.array([1.0, np.inf]))}, "finite and >= 0"),
        ({"node_seconds": (np.ones(2), np.full(2, np.inf))}, "finite strategy"),
        ({"node_seconds": (np.ones(2), np.array([1.0, np.nan]))}, "finite strategy"),
        ({"node_seconds": (np.ones(2), np.ones(2, np.float32))}, "float64"),
        ({"edges": ((1, 0),)}, "0 <= u < v"),
        ({"edges": ((0, 2),)}, "0 <= u < v"),
        ({"edges": ((0, 1), (0, 1)), "edge_seconds": (np.zeros((2, 2)),) * 2}, "twice"),
        ({"edge_seconds": (np.zeros((2, 3)),)}, "matrix"),
        ({"edge_seconds": ()}, "1 edges but 0"),
        ({"edge_seconds": (np.full((2, 2), np.nan),)}, "without nan"),
        ({"budget_bytes": -1.0}, "budget_bytes"),
    ],
)
def test_malformed_problems_are_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        two_nodes(**changes)


def test_objective_and_least_bytes_agree_with_brute_force() -> None:
    for seed in range(40):
        problem = small_problem(seed)
        oracle = brute_force(problem)
        rng = np.random.default_rng(seed)
        choice = tuple(int(rng.integers(len(c_v))) for c_v in problem.node_seconds)
        assert problem.seconds(choice) == pytest.approx(float(oracle.seconds[choice]))
        assert problem.bytes(choice) == float(oracle.bytes[choice])
        least = least_bytes(problem)
        assert least.bytes <= oracle.least_bytes()
        if least.exact:
            assert least.bytes == oracle.least_bytes()


def test_gap_is_relative_to_the_bound() -> None:
    found = IntraOpSolution((0,), 1.1, 0.0, 1.0, False, "dual", 0.0)
    assert found.gap == pytest.approx(0.1)


def test_import_needs_neither_torch_nor_a_solver_package() -> None:
    code = (
        "import sys, autopar.intraop.solver; "
        "print([m for m in ('ortools', 'pulp') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
