"""Whether a layer continues its predecessor as a copy of itself would continue it.

Layers p = r - 1 and r are congruent if they are neighbouring blocks of one list and of one class,
and whatever p reads, gives and is called, r reads, gives and is called one layer further. A value
read from outside is the very same one (a mask, a batch tensor), or it is p's where p reads that of
the layer before, or in backward that of the layer after r where p reads r's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch

from autopar.graph.layers import block_of, layer_classes
from autopar.graph.program import Graph, GraphInput, GraphOutput, InputKind, Operator, Phase, Ref

STATE = (InputKind.PARAMETER, InputKind.BUFFER)


@dataclass(frozen=True, slots=True)
class BlockPath:
    """A path through a numbered module: head.number + tail."""

    head: str
    number: int
    tail: str

    def at(self, number: int) -> str:
        """The same path in another block of the list."""
        return f"{self.head}.{number}{self.tail}" if self.head else f"{number}{self.tail}"


@lru_cache(maxsize=4096)
def block_path(path: str) -> BlockPath | None:
    """By the outermost numbered module; None where there is none, or in a repeated call of it."""
    block = block_of(path)
    if block is None or not block[1].isdigit():
        return None
    head, digits = block
    start = len(head) + 1 if head else 0
    return BlockPath(head, int(digits), path[start + len(digits) :])


def numbered_block(path: str) -> tuple[str, int] | None:
    """List and number of the block in which a path lies."""
    found = block_path(path)
    return None if found is None else (found.head, found.number)


@dataclass(frozen=True, slots=True)
class Congruence:
    """How layer r = `layer` continues p = r - 1.

    image: name of each operator and state input of p -> its counterpart in r.
    before: outer value that r reads -> the one that p reads in its place.
    """

    layer: int
    image: dict[str, str]
    before: dict[Ref, Ref]


def congruence(graph: Graph, layer: int) -> Congruence | str:
    """Of a layer and its predecessor, or the reason why there is none. O(edges)."""
    if not 1 <= layer < len(graph.layer_names):
        return "no layer precedes it"
    names = graph.layer_names[layer - 1 : layer + 1]
    blocks = [numbered_block(name) for name in names]
    if None in blocks or blocks[0] != (blocks[1][0], blocks[1][1] - 1):  # type: ignore[index]
        return f"{names[0]!r} before it is not the preceding block of its list"
    classes = layer_classes(graph)
    if classes[layer - 1] != classes[layer]:
        return f"its operators differ from those of {names[0]!r}"
    pair = _Pair(graph, layer, blocks[0], blocks[1])  # type: ignore[arg-type]
    return pair.mismatch() or Congruence(layer, pair.image, pair.before)


class _Pair:
    """Layers p and r of one class, and what was found to correspond so far."""

    def __init__(
        self, graph: Graph, layer: int, before: tuple[str, int], here: tuple[str, int]
    ) -> None:
        self.graph, self.p, self.r = graph, layer - 1, layer
        self.blocks = (before, here)
        self.layer_of = {op.name: op.layer for op in graph.operators}
        members: tuple[list[Operator], list[Operator]] = ([], [])
        for op in graph.operators:
            if op.layer in (self.p, self.r):
                members[op.layer - self.p].append(op)
        self.operators = list(zip(*members, strict=True))
        self.image = {old.name: new.name for old, new in self.operators}
        self.before: dict[Ref, Ref] = {}
        self.state: dict[str, int] = {  # name -> p or r
            i.name: self.p + self.blocks.index(block)
            for i in graph.inputs
            if i.kind in STATE and (block := numbered_block(i.target)) in self.blocks
        }

    def mismatch(self) -> str:
        """The first thing that is not one layer further, or ""."""
        steps = (
            self._scattered,
            self._state,
            self._provenance,
            self._reads,
            self._readers,
            self._outputs,
        )
        return next((reason for step in steps if (reason := step())), "")

    def _scattered(self) -> str:
        """Operators of a layer are neighbours in each phase."""
        runs = [key for key, _ in groupby((op.layer, op.phase) for op in self.graph.operators)]
        for layer in (self.p, self.r):
            if any(runs.count((layer, phase)) > 1 for phase in Phase):
                return f"operators of {self.graph.layer_names[layer]!r} lie among those of others"
        return ""

    def _state(self) -> str:
        """Parameters and buffers of the two blocks differ in the number of the block only."""
        inputs = self.graph.inputs
        before, here = (
            [i for i in inputs if self.state.get(i.name) == n] for n in (self.p, self.r)
        )
        if len(before) != len(here):
            return "it has other parameters than its predecessor"
        for old, new in zip(before, here, strict=True):
            if self._next_input(old) != replace(new, name=""):
                return f"its {new.target!r} is not the counterpart of {old.target!r}"
            self.image[old.name] = new.name
        return ""

    def _next_input(self, old: GraphInput) -> GraphInput:
        target, owner = self._next(old.target), self._next(old.owner)
        return replace(old, name="", target=target, owner=owner)

    def _next(self, path: str) -> str:
        """The path one block further; one outside of the block stays."""
        found = block_path(path)
        if found is None or (found.head, found.number) != self.blocks[0]:
            return path
        return found.at(found.number + 1)

    def _provenance(self) -> str:
        for old, new in self.operators:
            if self._next(old.module) != new.module:
                return f"{new.name} was called in {new.module!r}, {old.name} in {old.module!r}"
            if self.image.get(old.forward, old.forward) != new.forward:
                return f"{new.name} is the gradient of {new.forward}, {old.name} of {old.forward}"
        return ""

    def _reads(self) -> str:
        for old, new in self.operators:
            for was, ref in zip(old.operands, new.operands, strict=True):
                if self._home(ref.name) == self.r and self._home(was.name) == self.p:
                    continues = ref == Ref(self.image[was.name], was.index)
                else:
                    continues = self._continues(was, ref, new.phase)
                    self.before[ref] = was
                if not continues:
                    return f"{new.name} reads {ref} where {old.name} reads {was}"
        return ""

    def _home(self, name: str) -> int | None:
        """The layer that makes or owns a value; None for other inputs."""
        return self.layer_of.get(name, self.state.get(name))

    def _continues(self, was: Ref, ref: Ref, phase: Phase) -> bool:
        """An outer value: the very same, or the neighbour's where p reads its neighbour's."""
        old, new = self._home(was.name), self._home(ref.name)
        if was == ref:
            return new not in (self.p, self.r)
        if new == self.p:
            return ref.name in self.layer_of and (old is None or old < self.p)
        if old == self.r and phase is Phase.BACKWARD:
            return was.name in self.layer_of and new is not None and new > self.r
        data = self.graph.constants
        if was.name not in data or ref.name not in data:
            return False
        return same_data(data[was.name], data[ref.name])

    def _readers(self) -> str:
        """State of the two is read by themselves alone, their values by themselves and neighbours;
        the gradients that p gives may go to any earlier layer."""
        for op in self.graph.operators:
            for ref in op.operands:
                if self.state.get(ref.name, op.layer) != op.layer:
                    return f"{op.name} of another layer reads {ref}"
                home = self.layer_of.get(ref.name, -1)
                near = op.layer <= self.r if home == self.p else self.p <= op.layer <= self.r + 1
                if home in (self.p, self.r) and not near:
                    return f"{op.name}, which lies in no neighbour, reads {ref}"
        return ""

    def _outputs(self) -> str:
        before, here = (
            [out for out in self.graph.outputs if n in self._homes(out)] for n in (self.p, self.r)
        )
        if len(before) != len(here):
            return "it has other outputs than its predecessor"
        for old, new in zip(before, here, strict=True):
            ref, target = self.image.get(old.ref.name), self.image.get(old.target)
            if (old.kind, ref, old.ref.index, target) != (new.kind, *new.ref, new.target):
                return f"its {new.kind} {new.ref} is not {old.ref} one layer further"
        return ""

    def _homes(self, out: GraphOutput) -> tuple[int | None, int | None]:
        return self._home(out.ref.name), self._home(out.target)


def same_data(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
