"""Seeded programs: small mixed ones for the oracle, large layered ones for timing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopar.intraop.problem import FloatArray, IntraOpProblem

Edges = tuple[tuple[int, int], ...]
SHAPES = ("tree", "chain", "dense")


def small_problem(
    seed: int, *, max_nodes: int = 8, max_strategies: int = 4, with_budget: bool = False
) -> IntraOpProblem:
    """A tree, a chain with skip edges or a dense graph by seed; a third has forbidden entries.

    Strategy 0 is never forbidden, nor the pair (0, 0), so that some assignment is allowed. With a
    budget: between the least bytes of allowed strategies and those of the most.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, max_nodes + 1))
    sizes = [int(k) for k in rng.integers(1, max_strategies + 1, size=n)]
    edges = _edges(rng, SHAPES[seed % len(SHAPES)], n)
    scale = 10.0 ** rng.uniform(-4, 1)
    forbid = 0.2 if rng.random() < 1 / 3 else 0.0
    c = tuple(scale * _with_forbidden(rng, rng.random(k), forbid) for k in sizes)
    m = tuple(rng.integers(0, 1000, size=k).astype(np.float64) * 2.0**20 for k in sizes)
    shared: dict[tuple[int, int], FloatArray] = {}
    r = []
    for u, v in edges:
        key = (sizes[u], sizes[v])
        if key not in shared or rng.random() < 0.5:
            shared[key] = scale * _with_forbidden(rng, rng.random(key), forbid)
        r.append(shared[key])
    names = tuple(f"op{v}" for v in range(n))
    problem = IntraOpProblem(names, c, m, edges, tuple(r))
    if not with_budget:
        return problem
    low = sum(float(m_v[np.isfinite(c_v)].min()) for c_v, m_v in zip(c, m, strict=True))
    high = sum(float(m_v.max()) for m_v in m)
    return problem.with_budget(float(np.floor(low + rng.random() * (high - low))))


def _with_forbidden(rng: np.random.Generator, values: FloatArray, share: float) -> FloatArray:
    out = np.where(rng.random(values.shape) < share, np.inf, values)
    out.flat[0] = values.flat[0]
    return np.ascontiguousarray(out)


def _edges(rng: np.random.Generator, shape: str, n: int) -> Edges:
    if shape == "tree":
        return tuple(sorted((int(rng.integers(0, v)), v) for v in range(1, n)))
    if shape == "chain":
        skips = {(u, u + 2) for u in range(n - 2) if rng.random() < 0.5}
        skips |= {(u, u + 4) for u in range(n - 4) if rng.random() < 0.3}
        return tuple(sorted({(u, u + 1) for u in range(n - 1)} | skips))
    return tuple((u, v) for u in range(n) for v in range(u + 1, n) if rng.random() < 0.8)


def layered_problem(
    *, num_layers: int = 25, nodes_per_layer: int = 100, num_axes_choices: int = 7, seed: int = 0
) -> IntraOpProblem:
    """A transformer-like program on a 2-D mesh: identical layers, shared matrices, skip edges over
    each block.

    Node strategies are pairs of per-axis layouts (up to num_axes_choices ** 2 = 49); an edge costs
    a reshard per axis whose layouts differ. Seconds about 1e-4 a node; bytes fall with the number
    of sharded axes.
    """
    rng = np.random.default_rng(seed)
    kinds = [_kind(rng, num_axes_choices) for _ in range(nodes_per_layer)]
    pattern = _layer_edges(rng, nodes_per_layer)
    reshard: dict[tuple[int, int], FloatArray] = {}
    c, m, edges, r = [], [], [], []
    for layer in range(num_layers):
        base = layer * nodes_per_layer
        for _, seconds, num_bytes in kinds:
            c.append(seconds)
            m.append(num_bytes)
        for a, b in pattern:
            if base + b >= num_layers * nodes_per_layer:
                continue
            key = (a, b % nodes_per_layer)
            if key not in reshard:
                size_s = float(rng.uniform(0.2, 3.0)) * 1e-4
                reshard[key] = _reshard(kinds[key[0]][0], kinds[key[1]][0], size_s)
            edges.append((base + a, base + b))
            r.append(reshard[key])
    names = tuple(f"l{v // nodes_per_layer}.op{v % nodes_per_layer}" for v in range(len(c)))
    return IntraOpProblem(names, tuple(c), tuple(m), tuple(edges), tuple(r))


Kind = tuple[list[tuple[int, int]], FloatArray, FloatArray]


def _kind(rng: np.random.Generator, num_choices: int) -> Kind:
    """(layouts, seconds, bytes) of one operator; layout 0 is replicated, the others shard an
    axis.
    """
    heavy = rng.random() < 0.15
    num_layouts = num_choices if heavy else int(rng.integers(2, num_choices + 1))
    own = [
        0,
        *sorted(rng.choice(np.arange(1, num_choices), num_layouts - 1, replace=False).tolist()),
    ]
    layouts = [(a, b) for a in own for b in own]
    work_s = (rng.uniform(2.0, 8.0) if heavy else rng.uniform(0.01, 0.3)) * 1e-4
    size = rng.uniform(0.5, 2.0) * 2**30 if heavy else rng.uniform(0.0, 0.2) * 2**30
    shards = np.array([(2.0 if a else 1.0) * (4.0 if b else 1.0) for a, b in layouts])
    partial = np.array([1e-5 * ((a == 1) + (b == 1)) for a, b in layouts])
    # weights gathered at use: bytes and seconds pull apart
    gathered = np.array([(a % 3 == 2) + (b % 3 == 2) for a, b in layouts])
    seconds = work_s / shards + partial + gathered * size / 2**30 * 2e-4
    return layouts, seconds, np.floor(size / (shards ** (0.3 + 0.35 * gathered)))


def _layer_edges(rng: np.random.Generator, n: int) -> Sequence[tuple[int, int]]:
    """A chain, branches of 3 from hubs, two residual skips, and a few forward-to-backward edges; b
    may reach the next layer."""
    edges = {(v, v + 1) for v in range(n)}
    edges |= {(v, v + int(rng.integers(2, 6))) for v in range(0, n, 5)}
    edges |= {(0, n // 2), (n // 2, n)}
    half = n // 2
    edges |= {(v, n - 1 - v) for v in range(3, half - 2, 7)}
    return sorted(edges)


def _reshard(
    source: list[tuple[int, int]], target: list[tuple[int, int]], size_s: float
) -> FloatArray:
    """0 where both axes agree; gather, slice (free) or exchange otherwise, per axis; the slow axis
    costs more.
    """
    a, b = np.array(source), np.array(target)
    out = np.zeros((len(a), len(b)))
    for axis, slowness in ((0, 4.0), (1, 1.0)):
        x, y = a[:, None, axis], b[None, :, axis]
        price = np.where(x == y, 0.0, np.where(x == 0, 0.0, np.where(y == 0, 1.0, 0.4)))
        out += slowness * size_s * price + np.where(price > 0, 1e-5, 0.0)
    return np.ascontiguousarray(out)


def dense_problem(
    *, num_nodes: int, num_strategies: int, density: float = 0.4, seed: int = 0
) -> IntraOpProblem:
    """Unstructured costs on a dense graph: no relaxation is tight, every solver has to branch."""
    rng = np.random.default_rng(seed)
    pairs = ((u, v) for u in range(num_nodes) for v in range(u + 1, num_nodes))
    edges = tuple(pair for pair in pairs if rng.random() < density)
    k = num_strategies
    return IntraOpProblem(
        node_names=tuple(f"op{v}" for v in range(num_nodes)),
        node_seconds=tuple(rng.random(k) for _ in range(num_nodes)),
        node_bytes=tuple(rng.integers(0, 100, k).astype(np.float64) for _ in range(num_nodes)),
        edges=edges,
        edge_seconds=tuple(rng.random((k, k)) for _ in edges),
    )
