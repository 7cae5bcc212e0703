"""What is planned: the same training step at several numbers of microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from autopar.graph.program import Graph
from autopar.graph.repeat import Folded


class Workload(Protocol):
    """counts: numbers of microbatches that the search may choose from, rising."""

    @property
    def counts(self) -> tuple[int, ...]: ...

    def at(self, num_microbatches: int) -> Folded:
        """The graph of one microbatch, to price: it may be derived from another capture."""
        ...

    def exact(self, num_microbatches: int) -> Folded:
        """The graph that was really captured, to plan and run."""
        ...

    def expect(self, num_microbatches: int) -> None:
        """`exact` will be asked for it, so that it may be captured meanwhile."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OneGraph:
    """A captured graph with layers, at its number of microbatches."""

    folded: Folded
    num_microbatches: int

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.num_microbatches,)

    def at(self, num_microbatches: int) -> Folded:
        return self.folded

    exact = at

    def expect(self, num_microbatches: int) -> None:
        """It is there."""


def one_graph(graph: Graph, num_microbatches: int) -> OneGraph:
    """A workload of a graph that is not folded."""
    return OneGraph(Folded(graph, (1,) * len(graph.layer_names)), num_microbatches)
