"""The model at one number of microbatches, as the search prices it: by distinct layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.graph.layers import layer_classes
from autopar.graph.program import Graph, Ref
from autopar.graph.repeat import Folded, whole_graph
from autopar.intraop.compose import boundary_bytes
from autopar.layout import Dims
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import cut_stages, parameter_owners, stage_graph
from autopar.plan import Remat
from autopar.sharding.registry import RuleTable
from autopar.sharding.rule import Call, Rule


@dataclass(frozen=True, slots=True, eq=False)
class LayerClass:
    """Equal layers. layer: of the folded graph, the first of them; owned: canonical names of the
    parameters that no earlier layer reads, which is where they are kept."""

    layer: int
    owned: frozenset[str]


class Run(NamedTuple):
    """Consecutive layers as a stage. owned: canonical names of the parameters that it keeps."""

    graph: Graph
    prepared: PreparedStage
    owned: frozenset[str]


class Program:
    """Classes of layers, and one prepared graph of each under every recompute policy, made when it
    is asked for."""

    def __init__(
        self,
        folded: Folded,
        num_microbatches: int,
        pins: Mapping[str, str] | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        """compiled: what its stages run will be."""
        self.compiled = compiled
        self.folded = folded
        self.num_microbatches = num_microbatches
        self.pins = dict(pins or {})
        kinds = _split_by_pins(folded.graph, layer_classes(folded.graph), self.pins)
        self.classes = classes_of(folded.graph, kinds)
        self.kind_of_written = kinds  # of each layer of the folded graph
        self.kind_of_layer = np.repeat(np.array(kinds, dtype=np.int64), folded.copies)
        self.crossing = np.repeat(boundary_bytes(folded.graph), folded.copies)
        self.rules: dict[Call, Rule] = {}  # known so far: of all tables
        self._prepared: dict[Remat, tuple[PreparedStage, ...]] = {}
        self._runs: dict[tuple[tuple[int, int], Remat], Run] = {}
        self._written: dict[Remat, tuple[Graph, Mapping[Ref, Dims]]] = {}

    @property
    def num_layers(self) -> int:
        return len(self.kind_of_layer)

    def recomputed(self, graph: Graph, policies: Remat | Sequence[Remat]) -> Graph:
        """A graph of this model under the policies of its layers."""
        return apply_recompute(graph, policies, compiled=self.compiled)

    def prepared(self, remat: Remat) -> tuple[PreparedStage, ...]:
        """Of each class, alone."""
        if remat not in self._prepared:
            graph = self.recomputed(self.folded.graph, remat)
            dims = RuleTable(graph, known=self.rules).dims
            self._prepared[remat] = tuple(
                prepare_stage(stage_graph(graph, kind.layer, kind.layer), dims, self.rules)
                for kind in self.classes
            )
        return self._prepared[remat]

    def run(self, layers: tuple[int, int], policy: Remat) -> Run:
        """The layers first .. stop - 1 under a policy, every one written."""
        if (layers, policy) not in self._runs:
            if policy not in self._written:
                graph = self.recomputed(whole_graph(self.folded), policy)
                self._written[policy] = graph, RuleTable(graph, known=self.rules).dims
            graph, dims = self._written[policy]
            first_layers = sorted({0, *layers} - {self.num_layers})
            graphs = cut_stages(graph, first_layers)
            index = first_layers.index(layers[0])
            owned = frozenset(o for o, s in parameter_owners(graphs).items() if s == index)
            prepared = prepare_stage(graphs[index], dims, self.rules)
            self._runs[layers, policy] = Run(graphs[index], prepared, owned)
        return self._runs[layers, policy]

    def stage_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every stage by its layers: counts[U, classes] without repetition, and index[i, j], the
        row of the stage of layers i..j (-1 for j < i)."""
        layers, kinds = self.num_layers, len(self.classes)
        one_hot = np.zeros((layers + 1, kinds), dtype=np.int64)
        one_hot[np.arange(layers) + 1, self.kind_of_layer] = 1
        prefix = one_hot.cumsum(axis=0)
        first, last = np.triu_indices(layers)
        counts, row = np.unique(prefix[last + 1] - prefix[first], axis=0, return_inverse=True)
        index = np.full((layers, layers), -1, dtype=np.int64)
        index[first, last] = row.ravel()
        return counts, index


def classes_of(graph: Graph, kinds: Sequence[int]) -> tuple[LayerClass, ...]:
    """One per kind, in order of their first layers."""
    reader: dict[str, int] = {}
    owner = {i.ref: i.owner for i in graph.inputs if i.owner}
    for op in graph.operators:
        for ref in op.operands:
            if ref in owner:
                reader[owner[ref]] = min(reader.get(owner[ref], op.layer), op.layer)
    firsts: dict[int, int] = {}
    for layer, kind in enumerate(kinds):
        firsts.setdefault(kind, layer)
    return tuple(
        LayerClass(layer, frozenset(name for name, first in reader.items() if first == layer))
        for layer in firsts.values()
    )


def _split_by_pins(graph: Graph, kinds: Sequence[int], pins: Mapping[str, str]) -> tuple[int, ...]:
    """Equal layers are of one class where equal parameters are pinned alike."""
    owner = {i.ref: i.owner for i in graph.inputs if i.owner}
    pinned: dict[int, list[str | None]] = {}
    for op in graph.operators:
        pinned.setdefault(op.layer, []).extend(
            pins.get(owner[ref]) for ref in op.operands if ref in owner
        )
    numbers: dict[object, int] = {}
    return tuple(
        numbers.setdefault((kind, tuple(pinned.get(layer, ()))), len(numbers))
        for layer, kind in enumerate(kinds)
    )
