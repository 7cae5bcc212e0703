"""The messages of dual block ascent: sequential tree-reweighted passes (TRW-S, Kolmogorov, PAMI
2006) over a pairwise program laid out flat.

Nodes in index order; g_v = 1 / max(#earlier, #later neighbours); msg[v->w] in strategies of w:

    belief(v)  = c_v + sum_w msg[w->v]
    forward    for later w:    msg[v->w] = min over x_v of ( g_v belief(v) - msg[w->v] + R_vw )
    backward   the same, nodes in reverse, for earlier w
    bound      after a forward pass:  sum_v (1 - g_v #later(v)) min belief(v)
    primal     in the forward pass x_v = argmin c_v + sum_earlier R(x_w, .) + sum_later msg[w->v]
    slack      slack_v(s) = (1 - g_v #later)(belief_s - min belief)
                            + sum_later min_t [ g_v belief_s - msg[w->v]_s + R_st - msg[v->w]_t ]

Each edge term of the reparametrised objective has minimum 0, so `bound` holds for any messages,
and an assignment with x_v = s costs at least bound + slack_v(s). Messages are never normalised, or
the bound would be lost. A pass costs the sum of the edge entries. Here in numpy; `compiled` has the
same passes in C, with the same results to the last bit.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autopar.intraop.problem import FloatArray, IntArray
from autopar.intraop.reduce import Graph

Scalar = TypeVar("Scalar", bound=np.generic)
WarmMessages = dict[tuple[int, int], FloatArray]
"""msg[v->w] by (v, w)."""


@dataclass(frozen=True, slots=True)
class Arcs:
    """One per edge and end, in the order in which a node meets them. here, there: numbers of nodes.
    message: where msg[here->there] begins among all messages; reply: where msg[there->here]
    does. matrix: [n_here, n_there], finite; back: its transpose; exact: as given, inf where
    forbidden."""

    here: IntArray
    there: IntArray
    message: IntArray
    reply: IntArray
    matrix: list[FloatArray]
    back: list[FloatArray]
    exact: list[FloatArray]


class TreeReweighted:
    """The messages of one graph (a builder, local to one solve).

    nodes: in order; everything is by number in it. first: where a node's strategies begin among all
    of them. later, earlier: arcs to later and to earlier nodes, first_later and first_earlier where
    those of a node begin. Forbidden pairs enter at `forbidden_seconds`: a relaxation, so the bound
    stays valid.
    """

    def __init__(
        self, graph: Graph, forbidden_seconds: float = 0.0, warm: WarmMessages | None = None
    ) -> None:
        self.nodes = sorted(graph.unary)
        self.sizes = np.array([len(graph.unary[v]) for v in self.nodes], dtype=np.intp)
        self.first = _starts(self.sizes)
        self.unary = np.concatenate([graph.unary[v] for v in self.nodes])
        self._pairs = [(v, w) for v in self.nodes for w in sorted(graph.adj[v]) if w > v]
        number = {v: i for i, v in enumerate(self.nodes)}
        ends = np.array([(number[v], number[w]) for v, w in self._pairs], dtype=np.intp)
        one, two = ends.reshape(-1, 2).T
        self._starts = _starts(self.sizes[np.stack((two, one), axis=1).ravel()])
        self.messages = np.zeros(self._starts[-1])
        there, back = self._starts[:-1:2], self._starts[1::2]
        exact = [(graph.adj[v][w], graph.adj[w][v]) for v, w in self._pairs]
        finite = {id(m): m for pair in exact for m in pair}
        finite = {i: _without_inf(m, forbidden_seconds) for i, m in finite.items()}
        right, left = [finite[id(m)] for m, _ in exact], [finite[id(m)] for _, m in exact]
        self.later = Arcs(one, two, there, back, right, left, [m for m, _ in exact])
        order = np.argsort(two, kind="stable")
        self.earlier = Arcs(
            two[order],
            one[order],
            back[order],
            there[order],
            [left[e] for e in order],
            [right[e] for e in order],
            [exact[e][1] for e in order],
        )
        everybody = np.arange(len(self.nodes) + 1)
        self.first_later = np.searchsorted(self.later.here, everybody)
        self.first_earlier = np.searchsorted(self.earlier.here, everybody)
        if warm:
            self._start_from(warm)

    def _start_from(self, warm: WarmMessages) -> None:
        for (v, w), to_w, to_v in zip(self._pairs, *self._vectors(), strict=True):
            for end, vector in (((v, w), to_w), ((w, v), to_v)):
                last = warm.get(end)
                if last is not None and len(last) == len(vector):
                    vector[:] = last

    def by_edge(self) -> WarmMessages:
        """For a later solve to start from."""
        found: WarmMessages = {}
        for (v, w), to_w, to_v in zip(self._pairs, *self._vectors(), strict=True):
            found[v, w], found[w, v] = to_w, to_v
        return found

    def _vectors(self) -> tuple[list[FloatArray], list[FloatArray]]:
        """Per edge its message to the later end, and the one back."""
        vectors = [self.messages[a:b] for a, b in itertools.pairwise(self._starts.tolist())]
        return vectors[::2], vectors[1::2]

    def forward(self) -> tuple[float, IntArray]:
        """One forward pass: (bound, greedy position of each node)."""
        bound = 0.0
        position = np.zeros(len(self.nodes), dtype=np.intp)
        for v in range(len(self.nodes)):
            later = self._later(v)
            local = self._own(v).copy()
            for arc in self._earlier(v):
                local += self.earlier.matrix[arc][:, position[self.earlier.there[arc]]]
            for arc in later:
                local += self._reply(self.later, arc)
            position[v] = local.argmin()
            belief, g_v = self._belief(v), self._share(v)
            bound += (1.0 - g_v * len(later)) * float(belief.min())
            self._send(self.later, later, belief * g_v)
        return bound, position

    def backward(self) -> None:
        """One backward pass."""
        for v in range(len(self.nodes) - 1, -1, -1):
            if earlier := self._earlier(v):
                self._send(self.earlier, earlier, self._belief(v) * self._share(v))

    def beliefs(self) -> FloatArray:
        """[strategies]: belief(v) of every node."""
        return np.concatenate([self._belief(v) for v in range(len(self.nodes))])

    def slack(self) -> FloatArray:
        """[strategies]; valid right after `forward`."""
        return np.concatenate([self._slack(v) for v in range(len(self.nodes))])

    def cost(self, position: IntArray) -> float:
        """What an assignment costs, without the graph's constant; inf where it is forbidden."""
        total = 0.0
        for v, s in enumerate(position):
            total += float(self._own(v)[s])
        for one, two, matrix in zip(
            self.later.here, self.later.there, self.later.exact, strict=True
        ):
            total += float(matrix[position[one], position[two]])
        return total

    def by_node(self, values: NDArray[Scalar]) -> dict[int, NDArray[Scalar]]:
        """Views of [strategies], by node of the graph."""
        bounds = itertools.pairwise(self.first.tolist())
        return {v: values[a:b] for v, (a, b) in zip(self.nodes, bounds, strict=True)}

    def _own(self, v: int) -> FloatArray:
        return self.unary[self.first[v] : self.first[v + 1]]

    def _later(self, v: int) -> range:
        return range(self.first_later[v], self.first_later[v + 1])

    def _earlier(self, v: int) -> range:
        return range(self.first_earlier[v], self.first_earlier[v + 1])

    def _share(self, v: int) -> float:
        return 1.0 / max(1, len(self._later(v)), len(self._earlier(v)))

    def _reply(self, arcs: Arcs, arc: int) -> FloatArray:
        start = arcs.reply[arc]
        return self.messages[start : start + self.sizes[arcs.here[arc]]]

    def _message(self, arcs: Arcs, arc: int) -> FloatArray:
        start = arcs.message[arc]
        return self.messages[start : start + self.sizes[arcs.there[arc]]]

    def _send(self, arcs: Arcs, some: range, shared: FloatArray) -> None:
        for arc in some:
            rows = arcs.matrix[arc] + (shared - self._reply(arcs, arc))[:, None]
            np.minimum.reduce(rows, axis=0, out=self._message(arcs, arc))

    def _belief(self, v: int) -> FloatArray:
        belief = self._own(v).copy()
        for arc in self._earlier(v):
            belief += self._reply(self.earlier, arc)
        for arc in self._later(v):
            belief += self._reply(self.later, arc)
        return belief

    def _slack(self, v: int) -> FloatArray:
        belief, g_v, later = self._belief(v), self._share(v), self._later(v)
        slack: FloatArray = (1.0 - g_v * len(later)) * (belief - belief.min())
        for arc in later:
            message = self._message(self.later, arc)
            pair = np.minimum.reduce(self.later.back[arc] - message[:, None], axis=0)
            slack += np.maximum(0.0, pair + g_v * belief - self._reply(self.later, arc))
        return slack


def _starts(sizes: IntArray) -> IntArray:
    """Where each of consecutive runs begins, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.intp)


def _without_inf(matrix: FloatArray, forbidden_seconds: float) -> FloatArray:
    if np.isfinite(matrix).all():
        return matrix
    return np.where(np.isfinite(matrix), matrix, forbidden_seconds)
