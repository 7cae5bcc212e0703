"""Exact shrinking of a pairwise program: nodes with at most two neighbours vanish by min-plus.

    degree 0   constant += min c_v
    degree 1   c_u(s)   += min_v ( R_uv(s, v) + c_v )
    degree 2   R_uw     += min_v ( R_uv + c_v + R_vw )       (the edge u-w is made if absent)
    one strategy           its rows go into its neighbours' vectors, whatever the degree

The minimum is unchanged, and each vanished node is put back by one argmin. Only + and min are
used, so inf (forbidden) passes through. Rounds eliminate independent sets, so equal layers meet
equal operands and `Products` computes each product once per kind of layer. O(nodes * n^3) worst, n
strategies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from autopar.intraop.native import address, library
from autopar.intraop.problem import FloatArray, IntArray, IntraOpProblem

_CHUNK_ENTRIES = 1 << 18
"""Entries of a min-plus temporary: 2 MiB of float64, about one core's L2 cache."""


class Products:
    """Results shared by all edges with the same operands; keyed by array identity, which it keeps
    alive.
    """

    __slots__ = ("_alive", "_min_plus", "_sum", "_take", "_transpose")

    def __init__(self) -> None:
        self._alive: dict[int, FloatArray] = {}
        self._transpose: dict[int, FloatArray] = {}
        self._sum: dict[tuple[int, int], FloatArray] = {}
        self._take: dict[tuple[int, bytes, bytes], FloatArray] = {}
        self._min_plus: dict[tuple[int, int, bytes], FloatArray] = {}

    def _hold(self, array: FloatArray) -> int:
        self._alive[id(array)] = array
        return id(array)

    def transpose(self, matrix: FloatArray) -> FloatArray:
        """matrix' as its own contiguous array, so that minima always run along rows."""
        key = self._hold(matrix)
        if key not in self._transpose:
            flipped = np.ascontiguousarray(matrix.T)
            self._transpose[key] = flipped
            if matrix.flags.c_contiguous:
                self._transpose[self._hold(flipped)] = matrix
        return self._transpose[key]

    def add(self, first: FloatArray, second: FloatArray) -> FloatArray:
        key = (self._hold(first), self._hold(second))
        if key not in self._sum:
            self._sum[key] = first + second
        return self._sum[key]

    def take(self, matrix: FloatArray, rows: IntArray, cols: IntArray) -> FloatArray:
        """matrix[rows, cols] for sorted index lists."""
        if (len(rows), len(cols)) == matrix.shape:
            return matrix
        key = (self._hold(matrix), rows.tobytes(), cols.tobytes())
        if key not in self._take:
            self._take[key] = np.ascontiguousarray(matrix[np.ix_(rows, cols)])
        return self._take[key]

    def min_plus(self, r_vu: FloatArray, c_v: FloatArray, r_vw: FloatArray) -> FloatArray:
        """[n_u, n_w] = min over v of r_vu[v, u] + c_v[v] + r_vw[v, w]."""
        key = (self._hold(r_vu), self._hold(r_vw), c_v.tobytes())
        if key not in self._min_plus:
            self._min_plus[key] = min_plus(r_vu + c_v[:, None], r_vw)
        return self._min_plus[key]


def min_plus(left: FloatArray, right: FloatArray) -> FloatArray:
    """[n_u, n_w] = min over v of left[v, u] + right[v, w]."""
    functions = library()
    if functions is None:
        return min_plus_in_numpy(left, right)
    (n_v, n_u), n_w = left.shape, right.shape[1]
    out = np.empty((n_u, n_w))
    functions.min_plus(n_v, n_u, n_w, address(left), address(right), address(out))
    return out


def min_plus_in_numpy(left: FloatArray, right: FloatArray) -> FloatArray:
    """In blocks of u that stay in cache."""
    n_v, n_u = left.shape
    step = max(1, _CHUNK_ENTRIES // (n_v * right.shape[1]))
    out = np.empty((n_u, right.shape[1]))
    for first in range(0, n_u, step):
        block = left[:, first : first + step, None] + right[:, None, :]  # [n_v, step, n_w]
        np.minimum.reduce(block, axis=0, out=out[first : first + step])
    return out


@dataclass(frozen=True, slots=True)
class _Vanished:
    """What puts node back: x_node = argmin over its strategies of unary + sum of
    rows[x_neighbour].
    """

    node: int
    labels: IntArray
    unary: FloatArray
    neighbours: tuple[tuple[int, IntArray, FloatArray], ...]  # (id, its labels, matrix [n_nb, n_v])


class Graph:
    """A pairwise program being shrunk (a builder, local to one solve).

    unary[v]   c_v of the living nodes;   labels[v]  the original strategy of each of its entries,
    sorted
    adj[v][w]  R_vw oriented [n_v, n_w], contiguous both ways;   constant  what vanished nodes cost
    """

    __slots__ = ("_trail", "adj", "constant", "labels", "products", "unary")

    def __init__(self, problem: IntraOpProblem, unary: Iterable[FloatArray]) -> None:
        self.products = Products()
        self.constant = 0.0
        self.unary: dict[int, FloatArray] = dict(enumerate(unary))
        self.labels: dict[int, IntArray] = {
            v: np.arange(len(c_v), dtype=np.intp) for v, c_v in self.unary.items()
        }
        self.adj: dict[int, dict[int, FloatArray]] = {v: {} for v in self.unary}
        self._trail: list[_Vanished] = []
        for (u, v), r_uv in zip(problem.edges, problem.edge_seconds, strict=True):
            self._set_edge(u, v, r_uv)
        self.keep_allowed()

    def copy(self) -> Graph:
        """One that shrinks on its own; arrays and products are shared."""
        other = object.__new__(Graph)
        other.products, other.constant = self.products, self.constant
        other.unary, other.labels = dict(self.unary), dict(self.labels)
        other.adj = {v: dict(neighbours) for v, neighbours in self.adj.items()}
        other._trail = list(self._trail)
        return other

    def priced(self, more: Mapping[int, FloatArray]) -> Graph:
        """A copy with products of its own, in which these nodes cost more: by original strategy."""
        other = self.copy()
        other.products = Products()
        for v, c_v in more.items():
            other.unary[v] = self.unary[v] + c_v[self.labels[v]]
        return other

    def _set_edge(self, u: int, v: int, r_uv: FloatArray) -> None:
        r_vu = self.products.transpose(r_uv)
        self.adj[u][v] = self.products.transpose(r_vu)
        self.adj[v][u] = r_vu

    def keep(self, masks: dict[int, np.ndarray[tuple[int], np.dtype[np.bool_]]]) -> int:
        """Drop the strategies whose mask is False; returns how many. A node never loses all of
        them.
        """
        kept = {
            v: np.flatnonzero(mask) for v, mask in masks.items() if mask.any() and not mask.all()
        }
        for v, index in kept.items():
            self.labels[v] = self.labels[v][index]
            self.unary[v] = self.unary[v][index]
        for v in kept:
            for w in list(self.adj[v]):
                if w in kept and w < v:
                    continue  # done from w
                matrix = self.adj[v][w]
                cols = kept[w] if w in kept else np.arange(matrix.shape[1], dtype=np.intp)
                self._set_edge(v, w, self.products.take(matrix, kept[v], cols))
        return sum(int(len(masks[v]) - len(index)) for v, index in kept.items())

    def keep_allowed(self) -> bool:
        """Drop the forbidden strategies; False where a node has no other ones."""
        if not self.unary or np.isfinite(np.concatenate([*self.unary.values()])).all():
            return True
        masks = {v: np.isfinite(c_v) for v, c_v in self.unary.items()}
        self.keep(masks)
        return all(mask.any() for mask in masks.values())

    def reduce(self, kept: Collection[int] = ()) -> None:
        """Apply the four rules of the module docstring until none fits. kept: nodes that stay."""
        candidates = set(self.unary).difference(kept)
        while candidates:
            blocked: set[int] = set()
            touched: set[int] = set()
            for v in sorted(candidates):
                if v in blocked:
                    touched.add(v)
                    continue
                if len(self.adj[v]) > 2 and len(self.unary[v]) > 1:
                    continue
                neighbours = sorted(self.adj[v])
                self._vanish(v, neighbours)
                blocked.update(neighbours)
                touched.update(neighbours)
            candidates = (touched & self.unary.keys()).difference(kept)

    def _vanish(self, v: int, neighbours: list[int]) -> None:
        c_v, products = self.unary[v], self.products
        rows = {u: self.adj[v].pop(u) for u in neighbours}  # [n_v, n_u]
        record = tuple((u, self.labels[u], self.adj[u].pop(v)) for u in neighbours)
        self._trail.append(_Vanished(v, self.labels[v], c_v, record))
        del self.unary[v], self.labels[v], self.adj[v]
        if not neighbours:
            self.constant += float(c_v.min())
        elif len(c_v) == 1:
            self.constant += float(c_v[0])
            for u in neighbours:
                self.unary[u] = self.unary[u] + rows[u][0]
        elif len(neighbours) == 1:
            (u,) = neighbours
            self.unary[u] = self.unary[u] + np.minimum.reduce(rows[u] + c_v[:, None], axis=0)
        else:
            u, w = neighbours
            r_uw = products.min_plus(rows[u], c_v, rows[w])
            known = self.adj[u].get(w)
            self._set_edge(u, w, r_uw if known is None else products.add(known, r_uw))

    def restore(self, choice: dict[int, int]) -> tuple[int, ...]:
        """The original strategy of every node, from those of the living ones."""
        full = dict(choice)
        for gone in reversed(self._trail):
            cost = gone.unary
            if len(cost) > 1:
                for u, labels, r_uv in gone.neighbours:
                    cost = cost + r_uv[labels.searchsorted(full[u])]
            full[gone.node] = int(gone.labels[cost.argmin()])
        return tuple(full[v] for v in range(len(full)))
