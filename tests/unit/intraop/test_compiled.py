"""Passes in C give what those in numpy give, to the last bit; without a compiler numpy's run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from pathlib import Path

import numpy as np
import pytest

from autopar.intraop import compiled, native
from autopar.intraop.dual import ascend
from autopar.intraop.reduce import Graph, min_plus, min_plus_in_numpy
from autopar.intraop.sweep import TreeReweighted, WarmMessages
from tests.unit.intraop.random_problems import small_problem
from tests.unit.intraop.stages import gpt2_graph
from tests.unit.intraop.test_captured_layers import block_of, problem_of

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def fresh() -> Iterator[None]:
    """No library is known yet, nor afterwards."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def assert_same(graph: Graph, sweeps: int, forbidden_seconds: float = 50.0) -> None:
    library = native.library()
    assert library is not None
    start = np.random.default_rng(0)
    warm: WarmMessages = {
        (v, w): start.normal(size=len(graph.unary[w])) * 1e-3
        for v in graph.adj
        for w in graph.adj[v]
    }
    in_numpy = TreeReweighted(graph, forbidden_seconds, warm)
    in_c = compiled.CompiledTreeReweighted(library, graph, forbidden_seconds, warm)
    for _ in range(sweeps):
        bound, position = in_numpy.forward()
        c_bound, c_position = in_c.forward()
        assert (bound, position.tolist()) == (c_bound, c_position.tolist())
        assert in_numpy.cost(position) == in_c.cost(position)
        assert np.array_equal(in_numpy.slack(), in_c.slack())
        assert np.array_equal(in_numpy.beliefs(), in_c.beliefs())
        in_numpy.backward()
        in_c.backward()
        assert np.array_equal(in_numpy.messages, in_c.messages)


@needs_compiler
@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_same_bits_on_random_programs(seed: int) -> None:
    problem = small_problem(seed)
    assert_same(Graph(problem, problem.node_seconds), sweeps=6)


@needs_compiler
@pytest.mark.parametrize("mesh", [(8,), (2, 4)])
def test_same_bits_on_a_captured_layer(mesh: tuple[int, ...]) -> None:
    problem = problem_of(block_of(gpt2_graph()), mesh)
    graph = Graph(problem, problem.node_seconds)
    assert_same(graph, sweeps=2)
    graph.reduce()
    assert_same(graph, sweeps=5)


@needs_compiler
def test_same_bits_of_a_min_plus_product() -> None:
    rng = np.random.default_rng(1)
    for n_v, n_u, n_w in ((1, 1, 1), (3, 5, 2), (49, 49, 49), (7, 300, 300)):
        left, right = rng.normal(size=(n_v, n_u)), rng.normal(size=(n_v, n_w))
        left[rng.random(left.shape) < 0.2] = np.inf
        assert np.array_equal(min_plus(left, right), min_plus_in_numpy(left, right))


@needs_compiler
def test_processes_may_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(native.compiled_file, ["cc", "cc"])
    assert first == second
    assert list((tmp_path / "compiled").iterdir()) == [first]  # and no draft is left
    assert CDLL(str(first)).forward


@pytest.mark.parametrize("broken", ["compiler", "folder"])
def test_without_a_library_numpy_does_it(
    broken: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small_problem(7)
    graph = Graph(problem, problem.node_seconds)
    found = ascend(graph, deadline=time.monotonic() + 10.0)
    native.library.cache_clear()
    if broken == "compiler":
        monkeypatch.setenv("CC", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("AUTOPAR_CACHE_DIR", "/dev/null/nowhere")
    assert native.library() is None
    again = ascend(graph, deadline=time.monotonic() + 10.0)
    assert (found.choice, found.primal, found.bound) == (again.choice, again.primal, again.bound)
