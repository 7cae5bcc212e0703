"""The dual bound is never above the optimum, and slack never cuts a better assignment."""

from __future__ import annotations

import time

import numpy as np
import pytest

from autopar.intraop.dual import ascend
from autopar.intraop.reduce import Graph
from autopar.intraop.sweep import TreeReweighted
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import small_problem


@pytest.mark.parametrize("seed", range(0, 120, 2))
def test_bound_and_slack_hold_for_every_assignment(seed: int) -> None:
    problem = small_problem(seed)
    oracle = brute_force(problem)
    graph = Graph(problem, problem.node_seconds)
    found = ascend(graph, deadline=time.monotonic() + 10.0)
    optimum = oracle.optimum(None)
    assert found.bound <= optimum * (1 + 1e-12)
    assert found.primal >= optimum * (1 - 1e-12)
    for v, slack_v in found.slack.items():
        others = tuple(w for w in range(oracle.seconds.ndim) if w != v)
        min_marginal = oracle.seconds.min(axis=others)[graph.labels[v]]
        assert (found.bound + slack_v <= min_marginal * (1 + 1e-9) + 1e-15).all()


@pytest.mark.parametrize("seed", range(1, 40, 3))
def test_bound_never_falls(seed: int) -> None:
    problem = small_problem(seed)
    graph = Graph(problem, problem.node_seconds)
    messages = TreeReweighted(graph, 100.0)
    last = -np.inf
    for _ in range(20):
        bound, _ = messages.forward()
        assert bound >= last - 1e-9 * abs(bound)
        last = bound
        messages.backward()


def test_trees_are_tight() -> None:
    for seed in range(0, 60, 3):  # seed % 3 == 0: trees
        problem = small_problem(seed)
        graph = Graph(problem, problem.node_seconds)
        found = ascend(graph, deadline=time.monotonic() + 10.0)
        assert found.bound == pytest.approx(brute_force(problem).optimum(None), rel=1e-6)


def test_warm_messages_only_change_the_start() -> None:
    problem = small_problem(5)
    optimum = brute_force(problem).optimum(None)
    warm: dict[tuple[int, int], np.ndarray] = {}
    for _ in range(2):
        graph = Graph(problem, problem.node_seconds)
        found = ascend(graph, deadline=time.monotonic() + 10.0, warm=warm)
        assert found.bound <= optimum * (1 + 1e-12)
    assert warm
