"""The whole path without a budget, with the shortcut for small programs switched off."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from autopar.intraop import free
from autopar.intraop.dual import ascend
from autopar.intraop.free import TABLE_LIMIT, Effort, Priced, minimise
from autopar.intraop.reduce import Graph
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import small_problem


def effort(table_limit: int, allow_mip: bool) -> Effort:
    deadline = time.monotonic() + 20.0
    return Effort(deadline, target_gap=0.0, allow_mip=allow_mip, table_limit=table_limit)


@pytest.mark.parametrize("first", range(0, 300, 30))
def test_ascend_fix_and_eliminate_are_exact(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "_EASY_TABLE", 0)
    for seed in range(first, first + 30):
        problem = small_problem(seed)
        found = minimise(problem, problem.node_seconds, effort=effort(TABLE_LIMIT, False))
        optimum = brute_force(problem).optimum(None)
        assert found.choice is not None
        assert problem.seconds(found.choice) == pytest.approx(optimum, rel=1e-9), f"seed {seed}"
        assert found.bound == pytest.approx(optimum, rel=1e-9), f"seed {seed}"


def test_a_price_of_a_byte_is_a_cost() -> None:
    """What is reduced once holds at every price."""
    for seed in range(60):
        problem = small_problem(seed, with_budget=True)
        nbytes = [np.where(v % 2, m_v, 0.0) for v, m_v in enumerate(problem.node_bytes)]
        problem = replace(problem, node_bytes=tuple(nbytes), budget_bytes=None)
        priced = Priced(problem)
        scale = sum(c_v.min() for c_v in problem.node_seconds) / max(1.0, sum(map(np.max, nbytes)))
        for rate in (0.0, 0.3 * scale, 3.0 * scale):
            pairs = zip(problem.node_seconds, nbytes, strict=True)
            unary = tuple(c_v + rate * m_v for c_v, m_v in pairs)
            found = priced.minimise(rate, effort=effort(TABLE_LIMIT, False))
            want = brute_force(replace(problem, node_seconds=unary)).optimum(None)
            assert found.value == pytest.approx(want, rel=1e-9), f"seed {seed}"
            assert found.bound == pytest.approx(want, rel=1e-9), f"seed {seed}"
            assert found.choice is not None
            value = problem.seconds(found.choice) + rate * problem.bytes(found.choice)
            assert value == pytest.approx(want, rel=1e-9), f"seed {seed}"


def test_remainder_goes_to_the_mip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "_EASY_TABLE", 0)
    handed_over = 0
    for seed in range(2, 300, 3):  # seed % 3 == 2: dense graphs
        problem = small_problem(seed)
        found = minimise(problem, problem.node_seconds, effort=effort(0, True))
        optimum = brute_force(problem).optimum(None)
        assert found.value == pytest.approx(optimum, rel=1e-7), f"seed {seed}"
        assert found.bound <= optimum * (1 + 1e-9), f"seed {seed}"
        handed_over += found.used_mip
    assert handed_over > 5


def test_without_elimination_or_mip_the_bound_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "_EASY_TABLE", 0)
    for seed in range(2, 200, 3):
        problem = small_problem(seed)
        found = minimise(problem, problem.node_seconds, effort=effort(0, False))
        optimum = brute_force(problem).optimum(None)
        assert found.bound <= optimum * (1 + 1e-12)
        assert found.value >= optimum * (1 - 1e-12)
        assert np.isfinite(found.bound)


def test_messages_hold_for_the_strategies_that_fixing_leaves() -> None:
    """The bound goes on from where it was, and is one of the smaller program."""
    for seed in range(1, 60, 3):
        problem = small_problem(seed)
        graph = Graph(problem, problem.node_seconds)
        deadline = time.monotonic() + 20.0
        first = ascend(graph, deadline=deadline, max_sweeps=3)
        before = dict(graph.labels)
        graph.keep({v: np.arange(len(c_v)) != 0 for v, c_v in graph.unary.items()})
        again = ascend(
            graph, deadline=deadline, max_sweeps=1, warm=free._kept(first.messages, before, graph)
        )
        assert again.bound >= first.bound - 1e-9 * abs(first.bound), f"seed {seed}"
        unary = [c_v.copy() for c_v in problem.node_seconds]
        for v, c_v in enumerate(unary):
            kept = np.isin(np.arange(len(c_v)), graph.labels.get(v, before.get(v, ())))
            c_v[~kept] = np.inf
        optimum = brute_force(replace(problem, node_seconds=tuple(unary))).optimum(None)
        assert again.bound <= optimum * (1 + 1e-9), f"seed {seed}"
