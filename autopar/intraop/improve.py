"""Primal moves around an assignment that fits the budget: switch whole parts, then single nodes.

Both only ever save seconds and keep the bytes within the budget. O(edge rows) a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.intraop.problem import FloatArray, IntraOpProblem
from autopar.intraop.reduce import Products

_MAX_PASSES = 8
_WORTH = 1e-12
"""A move must save this share of the seconds: float noise is no saving."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A choice with its objective and its bytes."""

    choice: tuple[int, ...]
    seconds: float
    bytes: float

    @classmethod
    def of(cls, problem: IntraOpProblem, choice: tuple[int, ...]) -> Assignment:
        return cls(choice, problem.seconds(choice), problem.bytes(choice))


class Neighbourhood:
    """The program's edges by node: adj[v] = [(w, R_wv oriented [n_w, n_v])], for local costs."""

    __slots__ = ("_adj", "_heavy", "_problem")

    def __init__(self, problem: IntraOpProblem) -> None:
        products = Products()
        self._problem = problem
        self._heavy = [bool(m_v.any()) for m_v in problem.node_bytes]
        self._adj: list[list[tuple[int, FloatArray]]] = [[] for _ in problem.node_names]
        for (u, v), r_uv in zip(problem.edges, problem.edge_seconds, strict=True):
            self._adj[v].append((u, r_uv))
            self._adj[u].append((v, products.transpose(r_uv)))

    def switch_parts(self, start: Assignment, other: Assignment) -> Assignment:
        """Take from `other` the connected parts of differing nodes that save most, while they
        fit.
        """
        choice, num_bytes = list(start.choice), start.bytes
        differ = {v for v, s in enumerate(start.choice) if s != other.choice[v]}
        priced = []
        for part in self._parts(differ):
            seconds, part_bytes = self._price(part, start.choice, other.choice)
            priced.append((seconds, part_bytes, part))
        for seconds, part_bytes, part in sorted(priced, key=lambda item: (item[0], item[2][0])):
            if seconds >= 0:
                continue
            taken = part
            if not self._problem.fits(num_bytes + part_bytes):
                taken, part_bytes = self._best_run(part, choice, num_bytes, other.choice)
            num_bytes += part_bytes
            for v in taken:
                choice[v] = other.choice[v]
        return Assignment.of(self._problem, tuple(choice))

    def _parts(self, nodes: set[int]) -> list[list[int]]:
        parts, left = [], set(nodes)
        for first in sorted(nodes):
            if first not in left:
                continue
            left.discard(first)
            part, stack = [first], [first]
            while stack:
                for w, _ in self._adj[stack.pop()]:
                    if w in left:
                        left.discard(w)
                        part.append(w)
                        stack.append(w)
            parts.append(sorted(part))
        return parts

    def _price(
        self, part: list[int], now: tuple[int, ...], then: tuple[int, ...]
    ) -> tuple[float, float]:
        """(seconds, bytes) that switching the part from now to then adds; its surroundings stay."""
        inside, seconds, num_bytes = set(part), 0.0, 0.0
        for v in part:
            c_v, m_v = self._problem.node_seconds[v], self._problem.node_bytes[v]
            seconds += float(c_v[then[v]] - c_v[now[v]])
            num_bytes += float(m_v[then[v]] - m_v[now[v]])
            for w, r_wv in self._adj[v]:
                if w not in inside:
                    seconds += float(r_wv[now[w], then[v]] - r_wv[now[w], now[v]])
                elif w < v:
                    seconds += float(r_wv[then[w], then[v]] - r_wv[now[w], now[v]])
        return seconds, num_bytes

    def _best_run(
        self, part: list[int], choice: list[int], num_bytes: float, then: tuple[int, ...]
    ) -> tuple[list[int], float]:
        """(nodes, bytes) of the first or last nodes of a part that save most and fit; may be none.

        Nodes follow the layers of the model: a run is about "the first k layers switch". O(edges of
        the part).
        """
        layers = self._problem.node_layers
        ordered = sorted(part, key=layers.__getitem__) if layers else part
        best, best_seconds, best_bytes = part[:0], 0.0, 0.0
        for order in (ordered, ordered[::-1]):
            trial = {v: choice[v] for v in order}
            seconds = added = 0.0
            clashes = 0  # forbidden pairs
            for count, v in enumerate(order, start=1):
                c_v, m_v = self._problem.node_seconds[v], self._problem.node_bytes[v]
                before, after = choice[v], then[v]
                seconds += float(c_v[after]) - float(c_v[before])
                added += float(m_v[after]) - float(m_v[before])
                for w, r_wv in self._adj[v]:
                    row = r_wv[trial.get(w, choice[w])]
                    old, new = float(row[before]), float(row[after])
                    seconds += (new if new < np.inf else 0.0) - (old if old < np.inf else 0.0)
                    clashes += (new == np.inf) - (old == np.inf)
                trial[v] = after
                if not clashes and seconds < best_seconds and self._problem.fits(num_bytes + added):
                    best, best_seconds, best_bytes = order[:count], seconds, added
        return best, best_bytes

    def move_nodes(self, start: Assignment) -> Assignment:
        """Single-node moves, first to last, until a pass finds none. A node whose neighbours are as
        it last saw them moves only if there is more room."""
        problem = self._problem
        choice, num_bytes = list(start.choice), start.bytes
        worth = _WORTH * abs(start.seconds)
        seen = [np.inf] * len(choice)  # bytes when a node was looked at; inf: neighbours moved
        for _ in range(_MAX_PASSES):
            moved = False
            for v, c_v in enumerate(problem.node_seconds):
                if num_bytes >= seen[v]:
                    continue
                local = c_v.copy()
                for w, r_wv in self._adj[v]:
                    local += r_wv[choice[w]]
                after = None
                if self._heavy[v]:
                    m_v = problem.node_bytes[v]
                    after = num_bytes + m_v - m_v[choice[v]]
                    if problem.budget_bytes is not None:
                        local[~(after <= max(problem.budget_bytes, num_bytes))] = np.inf
                s = int(local.argmin())
                if s != choice[v] and local[s] < local[choice[v]] - worth:
                    choice[v], moved = s, True
                    num_bytes = num_bytes if after is None else float(after[s])
                    for w, _ in self._adj[v]:
                        seen[w] = np.inf
                seen[v] = num_bytes
            if not moved:
                break
        return Assignment.of(problem, tuple(choice))
