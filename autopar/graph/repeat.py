"""Stub until capture lands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.program import Graph


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    graph: Graph
    copies: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return sum(self.copies)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self.graph.layer_names


def with_copies(folded: Folded, copies: Sequence[int]) -> Graph:
    assert set(copies) == {1}
    return folded.graph


def whole_graph(folded: Folded) -> Graph:
    return with_copies(folded, folded.copies)
