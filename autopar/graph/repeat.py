"""Graphs in which one layer stands for many: a model of 126 equal blocks as a graph of three.

A layer r that is congruent to its predecessor p (`graph.congruence`) may stand for any number of
layers. A copy of r is r with the number of the block replaced in every path, and in forward each
value of p by that of the copy before; in backward a copy reads of the copy after it what p reads of
r, and the last copy what r reads of the next layer n:

    p --> r --> r' --> r" --> n
    p <-- r <-- r' <-- r" <-- n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TypeVar

from autopar.errors import InternalError, OptionError
from autopar.graph.congruence import STATE, Congruence, block_path, congruence, numbered_block
from autopar.graph.layers import check_layers
from autopar.graph.numbering import renumbered, with_op_id
from autopar.graph.program import (
    Graph,
    GraphInput,
    GraphOutput,
    Operator,
    Phase,
    Ref,
    check_graph,
)

Item = TypeVar("Item", GraphInput, GraphOutput, Operator)


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A joint graph with layers, in which a layer may stand for several equal consecutive ones.

    copies: for each layer of `graph` how many consecutive layers of the model it stands for. Blocks
    keep the numbers that they have in the model: after layers.1, standing for 30, comes layers.31.
    """

    graph: Graph
    copies: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.copies) != len(self.graph.layer_names) or min(self.copies, default=0) < 1:
            raise InternalError(
                f"a folded graph of {len(self.graph.layer_names)} layers needs as many copies, each"
                f" at least 1: got {self.copies}"
            )

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return sum(self.copies)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Of the whole model."""
        return _Paths(self, self.copies).layer_names()


@lru_cache(maxsize=1)  # the search writes its winner out, and then whoever asked for a plan
def whole_graph(folded: Folded) -> Graph:
    """The graph of the whole model, as a capture without folding makes it."""
    return with_copies(folded, folded.copies)


def with_copies(folded: Folded, copies: Sequence[int]) -> Graph:
    """The graph in which layer i is written copies[i] times: that of a model with so many blocks,
    numbered without gaps. OptionError for a layer that cannot be repeated. O(edges of the result).
    """
    if len(copies) != len(folded.copies) or min(copies, default=0) < 1:
        raise OptionError(
            f"copies must be {len(folded.copies)} positive numbers, one per layer: got {copies}"
        )
    if max(copies) == max(folded.copies) == 1:
        return folded.graph
    repeated: dict[int, Congruence] = {}
    for layer, count in enumerate(copies):
        if count == 1:
            continue
        found = congruence(folded.graph, layer)
        if layer - 1 in repeated:
            found = "its predecessor is repeated too"
        if isinstance(found, str):
            name = folded.graph.layer_names[layer]
            raise OptionError(f"layer {name!r} cannot be repeated: {found}")
        repeated[layer] = found
    whole = _Expansion(folded.graph, copies, repeated, _Paths(folded, copies)).graph()
    return check_layers(check_graph(renumbered(whole)))


class _Paths:
    """Paths of modules, parameters and layers in the graph with these copies."""

    def __init__(self, folded: Folded, copies: Sequence[int]) -> None:
        self._names, self._copies = folded.graph.layer_names, copies
        self._added: dict[str, list[tuple[int, int]]] = {}  # list -> (block, copies more)
        for name, new, old in zip(self._names, copies, folded.copies, strict=True):
            block = numbered_block(name)
            if new != old and block is not None:
                self._added.setdefault(block[0], []).append((block[1], new - old))

    def path(self, path: str, copy: int = 0) -> str:
        """Of the copy-th further copy of what the folded graph calls so."""
        found = block_path(path) if copy or self._added else None
        if found is None:
            return path
        added = self._added.get(found.head, ())
        return found.at(found.number + copy + sum(n for block, n in added if block < found.number))

    def layer_names(self) -> tuple[str, ...]:
        pairs = zip(self._names, self._copies, strict=True)
        return tuple(self.path(name, copy) for name, n in pairs for copy in range(n))


class _Expansion:
    """Writes a graph with copies. Until it is renumbered, a value is called "x@k" in the k-th
    further copy of the layer that makes x."""

    def __init__(
        self, graph: Graph, copies: Sequence[int], repeated: dict[int, Congruence], paths: _Paths
    ) -> None:
        self._graph, self._copies, self._repeated, self._paths = graph, copies, repeated, paths
        self._first = [sum(copies[:layer]) for layer in range(len(copies))]
        layers = {numbered_block(graph.layer_names[layer]): layer for layer in repeated}
        self._home = {  # the layer that makes a value, or whose state it is
            i.name: layers[block]
            for i in graph.inputs
            if i.kind in STATE and (block := numbered_block(i.target)) in layers
        }
        for layer, pair in repeated.items():  # constants that each block has for itself
            own = (new for new, old in pair.before.items() if new != old)
            self._home.update((ref.name, layer) for ref in own if ref.name in graph.constants)
        self._home.update((op.name, op.layer) for op in graph.operators)

    def graph(self) -> Graph:
        graph = self._graph
        inputs = self._written(graph.inputs, lambda i: self._home.get(i.name, -1), self._input)
        return replace(
            graph,
            inputs=tuple(inputs),
            operators=tuple(self._written(graph.operators, lambda op: op.layer, self._operator)),
            outputs=tuple(self._written(graph.outputs, self._home_of_output, self._output)),
            layer_names=self._paths.layer_names(),
            constants={
                _copy(name, k): data
                for name, data in graph.constants.items()
                for k in range(self._count(self._home.get(name, -1)))
            },
            weights={
                _copied(ref, k): size
                for ref, size in graph.weights.items()
                for k in range(self._count(self._home.get(ref.name, -1)))
            },
        )

    def _count(self, layer: int) -> int:
        return self._copies[layer] if layer in self._repeated else 1

    def _written(
        self,
        items: Sequence[Item],
        home: Callable[[Item], int],
        written: Callable[[Item, int], Item],
    ) -> Iterator[Item]:
        """Neighbours of one layer and kind together, copy after copy; last copy first in
        backward."""

        def kind(item: Item) -> tuple[int, object]:
            return home(item), item.phase if isinstance(item, Operator) else item.kind

        for (layer, what), run in groupby(items, key=kind):
            members = list(run)
            copies = range(self._count(layer))
            for copy in reversed(copies) if what is Phase.BACKWARD else copies:
                yield from (written(item, copy) for item in members)

    def _input(self, inp: GraphInput, copy: int) -> GraphInput:
        if inp.kind not in STATE:
            return replace(inp, name=_copy(inp.name, copy))
        own = numbered_block(inp.owner) == numbered_block(inp.target)
        return replace(
            inp,
            name=_copy(inp.name, copy),
            target=self._paths.path(inp.target, copy),
            owner=self._paths.path(inp.owner, copy if own else 0),
        )

    def _output(self, out: GraphOutput, copy: int) -> GraphOutput:
        return replace(out, ref=_copied(out.ref, copy), target=_copy(out.target, copy))

    def _home_of_output(self, out: GraphOutput) -> int:
        return self._home.get(out.target, self._home[out.ref.name])

    def _operator(self, op: Operator, copy: int) -> Operator:
        def read(ref: Ref) -> Ref:
            return self._read(ref, op, copy)

        if copy:  # any number of its own, until the graph is renumbered
            op = with_op_id(op, lambda number: (number, copy))
        block = numbered_block(self._graph.layer_names[op.layer])
        inside = copy and numbered_block(op.module) == block
        return op.reading(
            read,
            name=_copy(op.name, copy),
            module=self._paths.path(op.module, copy if inside else 0),
            forward=_copy(op.forward, copy),
            layer=self._first[op.layer] + copy,
        )

    def _read(self, ref: Ref, op: Operator, copy: int) -> Ref:
        """What a copy of an operator reads in the place of `ref`."""
        layer, home = op.layer, self._home.get(ref.name)
        if home == layer:
            return _copied(ref, copy)
        if home is None:
            return ref
        if home == layer - 1 and home in self._repeated:
            return _copied(ref, self._copies[home] - 1)
        pair = self._repeated.get(layer)
        if pair is None:
            return ref
        if home == layer - 1 and copy:
            return _copied(Ref(pair.image[ref.name], ref.index), copy - 1)
        before = pair.before[ref]
        if self._home.get(before.name) == layer and copy < self._copies[layer] - 1:
            return _copied(before, copy + 1)
        return ref


def _copy(name: str, copy: int) -> str:
    return f"{name}@{copy}" if copy and name else name


def _copied(ref: Ref, copy: int) -> Ref:
    return Ref(_copy(ref.name, copy), ref.index)
