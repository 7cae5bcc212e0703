"""Reduction and elimination keep the optimum; restore puts the vanished nodes back."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.intraop.eliminate import eliminate, elimination_order
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.reduce import Graph
from tests.unit.intraop.brute_force import brute_force
from tests.unit.intraop.random_problems import small_problem


def living_problem(graph: Graph) -> IntraOpProblem:
    nodes = sorted(graph.unary)
    pairs = [(v, w) for v in nodes for w in sorted(graph.adj[v]) if v < w]
    return IntraOpProblem(
        tuple(f"n{v}" for v in nodes),
        tuple(graph.unary[v] for v in nodes),
        tuple(np.zeros(len(graph.unary[v])) for v in nodes),
        tuple((nodes.index(v), nodes.index(w)) for v, w in pairs),
        tuple(graph.adj[v][w] for v, w in pairs),
    )


@pytest.mark.parametrize("seed", range(60))
def test_reduction_keeps_the_optimum(seed: int) -> None:
    problem = small_problem(seed)
    graph = Graph(problem, problem.node_seconds)
    graph.reduce()
    assert all(len(graph.adj[v]) > 2 for v in graph.unary)
    rest = living_problem(graph)
    oracle = brute_force(rest)
    optimum = brute_force(problem).optimum(None)
    assert graph.constant + oracle.optimum(None) == pytest.approx(optimum, rel=1e-12)
    best = np.unravel_index(int(np.argmin(oracle.seconds)), oracle.seconds.shape)
    living = {v: int(graph.labels[v][s]) for v, s in zip(sorted(graph.unary), best, strict=True)}
    assert problem.seconds(graph.restore(living)) == pytest.approx(optimum, rel=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_elimination_is_exact(seed: int) -> None:
    problem = small_problem(seed)
    graph = Graph(problem, problem.node_seconds)
    order = elimination_order(graph, 10**7)
    assert order is not None
    choice, value = eliminate(graph, order)
    optimum = brute_force(problem).optimum(None)
    assert value == pytest.approx(optimum, rel=1e-12)
    assert problem.seconds(graph.restore(choice)) == pytest.approx(optimum, rel=1e-12)


def test_elimination_refuses_a_large_table() -> None:
    rng = np.random.default_rng(0)
    c = tuple(rng.random(4) for _ in range(6))
    edges = tuple((u, v) for u in range(6) for v in range(u + 1, 6))
    problem = IntraOpProblem(tuple("abcdef"), c, c, edges, tuple(rng.random((4, 4)) for _ in edges))
    graph = Graph(problem, c)
    assert elimination_order(graph, 4**6 - 1) is None
    found = elimination_order(graph, 4**6)
    assert found is not None
    assert found.largest_table == 4**6


def test_equal_layers_share_products() -> None:
    """A chain of equal nodes: one product per round of halving, not one per node."""
    r, c = np.random.default_rng(1).random((5, 5)), np.random.default_rng(2).random(5)
    n = 64
    edges = tuple((v, v + 1) for v in range(n - 1))
    problem = IntraOpProblem(tuple(map(str, range(n))), (c,) * n, (c,) * n, edges, (r,) * (n - 1))
    graph = Graph(problem, problem.node_seconds)
    graph.reduce()
    assert not graph.unary
    assert len(graph.products._min_plus) <= 16


def test_dropping_strategies_keeps_labels() -> None:
    problem = small_problem(2)
    graph = Graph(problem, problem.node_seconds)
    v = max(graph.unary, key=lambda node: len(graph.unary[node]))
    last = len(graph.unary[v]) - 1
    mask = np.arange(last + 1) == last
    dropped = graph.keep({v: mask})
    assert dropped == last
    graph.reduce()
    choice = graph.restore({w: int(graph.labels[w][0]) for w in graph.unary})
    assert choice[v] == last
