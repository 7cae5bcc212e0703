"""The passes of `sweep` in C where there is a compiler, with the same results to the last bit."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from autopar.intraop.native import address, library
from autopar.intraop.problem import FloatArray, IntArray
from autopar.intraop.reduce import Graph
from autopar.intraop.sweep import Arcs, TreeReweighted, WarmMessages


def tree_reweighted(
    graph: Graph, forbidden_seconds: float = 0.0, warm: WarmMessages | None = None
) -> TreeReweighted:
    """Its messages, with passes in C where they can be had."""
    passes = library()
    if passes is None:
        return TreeReweighted(graph, forbidden_seconds, warm)
    return CompiledTreeReweighted(passes, graph, forbidden_seconds, warm)


class CompiledTreeReweighted(TreeReweighted):
    """The same on the same arrays, which C sees by their addresses."""

    def __init__(
        self,
        passes: ctypes.CDLL,
        graph: Graph,
        forbidden_seconds: float = 0.0,
        warm: WarmMessages | None = None,
    ) -> None:
        super().__init__(graph, forbidden_seconds, warm)
        self._passes = passes
        self._work = np.empty((2, self.sizes.max(initial=1)))
        self._nodes = _rows(
            self.first[:-1],
            self.sizes,
            self.first_later[:-1],
            np.diff(self.first_later),
            self.first_earlier[:-1] + len(self.later.here),
            np.diff(self.first_earlier),
        )
        tables = (_table(self.later, self.messages), _table(self.earlier, self.messages))
        self._arcs = np.ascontiguousarray(np.concatenate(tables))
        arrays = self._nodes, self._arcs, self.unary
        self._program = (len(self.nodes), *map(address, arrays))
        self._room = address(self._work), self._work.shape[1]

    def forward(self) -> tuple[float, IntArray]:
        position = np.zeros(len(self.nodes), dtype=np.int64)
        bound = self._passes.forward(*self._program, *self._room, address(position))
        return bound, position

    def backward(self) -> None:
        self._passes.backward(*self._program, *self._room)

    def beliefs(self) -> FloatArray:
        out = np.empty_like(self.unary)
        self._passes.beliefs(*self._program, address(out))
        return out

    def slack(self) -> FloatArray:
        out = np.empty_like(self.unary)
        self._passes.slack(*self._program, *self._room, address(out))
        return out

    def cost(self, position: IntArray) -> float:
        return float(self._passes.cost(*self._program, address(position)))


def _table(arcs: Arcs, messages: FloatArray) -> NDArray[np.int64]:
    """sweep.c's Arc of every arc."""
    known: dict[int, int] = {}  # addresses by identity: most arcs share their matrices

    def addresses(matrices: list[FloatArray]) -> list[int]:
        for matrix in matrices:
            if id(matrix) not in known:
                assert matrix.flags.c_contiguous
                known[id(matrix)] = address(matrix)
        return [known[id(matrix)] for matrix in matrices]

    first, width = address(messages), messages.itemsize
    return _rows(
        arcs.there,
        first + width * arcs.message,
        first + width * arcs.reply,
        *map(addresses, (arcs.matrix, arcs.back, arcs.exact)),
    )


def _rows(*columns: IntArray | list[int]) -> NDArray[np.int64]:
    """[n, columns], one struct of sweep.c after the other."""
    return np.ascontiguousarray(np.array(columns, dtype=np.int64).T)
