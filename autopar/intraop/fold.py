"""Equal layers folded inside the intra-op program: the size of a stage does not grow with depth.

The stage graph has k equal layers written twice, a and b. They all take the same choices, so that
the nodes of b are those of a:

    node of a                                           k c_v,  k m_v
    edge inside a                                       k R
    edge between a and b                                (k - 1) R, of a's nodes among themselves;
                                                        a node with itself: c_v += (k - 1) diag R
    edge of a and b with a node that both touch         k R
    edge of a with what comes before, of b with what    R
    comes after

The minimum is that of the k layers written out in which they choose alike. The first and the last
layer of a model differ from the inner ones and stay explicit, so the layouts at the ends of the run
are variables like any other.

`match_layers` finds which operator of b is which of a, and refuses (`NotFoldable`) what does not
repeat: a value of a that is read beyond b, say. O(edges).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import AutoparError
from autopar.graph.hubs import is_hub
from autopar.graph.program import (
    Graph,
    InputKind,
    Operator,
    OutputKind,
    Phase,
    Ref,
)
from autopar.intraop.problem import FloatArray
from autopar.intraop.reduce import Products
from autopar.intraop.stage_problem import Copy, Fold, Part, StageProblem

_PRIVATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)


class NotFoldable(AutoparError):
    """Layers that do not repeat exactly: solve the stage unfolded, or fold others."""


@dataclass(frozen=True, slots=True)
class Twins:
    """copy: 0 or 1, of the operators and inputs that are in the first or second written copy.
    first: name in the second copy -> name in the first. shared: (value, operator) where the value
    is outside and both copies read it at the same place."""

    copy: Mapping[str, int]
    first: Mapping[str, str]
    shared: frozenset[tuple[str, str]]


class _Matcher:
    """The correspondence found so far (a builder, local to one call)."""

    def __init__(self, graph: Graph, fold: Fold) -> None:
        self.graph, self.fold = graph, fold
        self.operators = {op.name: op for op in graph.operators}
        self.copy: dict[str, int] = {}
        for op in graph.operators:
            which = (op.layer - fold.layer) // fold.period
            if which in (0, 1):
                self.copy[op.name] = which
        self.first: dict[str, str] = {}
        self.shared: set[tuple[str, str]] = set()

    def refuse(self, why: str) -> NotFoldable:
        fold = self.fold
        return NotFoldable(
            f"layers {fold.layer} and {fold.layer + fold.period} do not repeat: {why}"
        )

    def match(self) -> Twins:
        pairs = self._in_order(hubs=False)
        pairs += self._sums(pairs)
        for one, two in pairs:
            for a, b in zip(one.operands, two.operands, strict=False):
                if a == b:
                    self._leave_out(a)
        pairs += self._in_order(hubs=True)
        self.first.update((two.name, one.name) for one, two in pairs)
        for one, two in pairs:
            self._check_pair(one, two)
        self._check_readers()
        self._check_outputs()
        return Twins(self.copy, self.first, frozenset(self.shared))

    def _in_order(self, *, hubs: bool) -> list[tuple[Operator, Operator]]:
        pairs: list[tuple[Operator, Operator]] = []
        for phase in Phase:
            one, two = (
                [
                    op
                    for op in self.graph.operators
                    if op.phase is phase and self.copy.get(op.name) == which and is_hub(op) == hubs
                ]
                for which in (0, 1)
            )
            if len(one) != len(two):
                what = "hubs" if hubs else "operators"
                raise self.refuse(f"{len(one)} and {len(two)} {what} in {phase}")
            pairs += zip(one, two, strict=True)
        return pairs

    def _sums(
        self, pairs: Sequence[tuple[Operator, Operator]]
    ) -> Iterator[tuple[Operator, Operator]]:
        """Operators behind the layers that take a value of each in turn, sums of balance losses:
        they join the copies."""
        readers = self.graph.readers()
        todo = list(pairs)
        while todo:
            one, two = todo.pop()
            for a, b in zip(one.refs, two.refs, strict=False):
                late_a, late_b = (
                    [r for r in readers.get(ref, ()) if self._behind(r)] for ref in (a, b)
                )
                if len(late_a) == len(late_b) == 1 and late_a[0].target == late_b[0].target:
                    pair = late_a[0], late_b[0]
                    if pair[0] is pair[1] or b in pair[0].operands or a in pair[1].operands:
                        continue
                    self.copy[pair[0].name], self.copy[pair[1].name] = 0, 1
                    todo.append(pair)
                    yield pair

    def _behind(self, op: Operator) -> bool:
        last = self.fold.layer + 2 * self.fold.period - 1
        return op.phase is Phase.FORWARD and op.layer > last and op.name not in self.copy

    def _leave_out(self, ref: Ref) -> None:
        """Hubs of a shared value are outside, whichever layer reads them first."""
        op = self.operators.get(ref.name)
        if op is not None and is_hub(op) and self.copy.pop(op.name, None) is not None:
            self._leave_out(op.operands[0])

    def _check_pair(self, one: Operator, two: Operator) -> None:
        if one.target != two.target or one.results != two.results:
            raise self.refuse(f"{one} and {two}")
        if len(one.operands) != len(two.operands):
            raise self.refuse(f"{one} and {two}")
        for a, b in zip(one.operands, two.operands, strict=True):
            in_a, in_b = self.copy.get(a.name), self.copy.get(b.name)
            if a == b and in_a is None:
                self.shared |= {(a.name, one.name), (b.name, two.name)}
            elif (in_a, in_b) == (0, 1):
                if self.first[b.name] != a.name or a.index != b.index:
                    raise self.refuse(f"{one} reads {a} where {two} reads {b}")
            elif in_a is None and in_b is None:
                self._pair_inputs(a, b)
            elif (in_a, in_b) not in ((None, 0), (1, None)):  # from the copy before, or behind
                raise self.refuse(f"{one} reads {a} where {two} reads {b}")

    def _pair_inputs(self, a: Ref, b: Ref) -> None:
        inputs = {i.name: i for i in self.graph.inputs}
        one, two = inputs.get(a.name), inputs.get(b.name)
        if one is None or two is None or one.kind is not two.kind or one.kind not in _PRIVATE:
            raise self.refuse(f"{a} and {b} are neither one value nor values of their own")
        owners = [i.owner for i in self.graph.inputs if i.owner]
        if any(i.owner and owners.count(i.owner) > 1 for i in (one, two)):
            raise self.refuse(f"{a} or {b} is tied")
        self.copy[a.name], self.copy[b.name] = 0, 1
        self.first[b.name] = a.name

    def _check_readers(self) -> None:
        """Forward values leave the second copy only, backward ones the first; inputs stay."""
        for op in self.graph.operators:
            if op.name not in self.copy:
                for ref in op.operands:
                    self._check_leaves(ref, str(op))

    def _check_leaves(self, ref: Ref, where: str) -> None:
        which = self.copy.get(ref.name)
        if which is None:
            return
        made = self.operators.get(ref.name)
        if made is None or which != (1 if made.phase is Phase.FORWARD else 0):
            raise self.refuse(f"{ref} of one of them is read by {where}")

    def _check_outputs(self) -> None:
        targets: dict[str, Ref] = {
            out.target: out.ref for out in self.graph.outputs if out.target in self.copy
        }
        for out in self.graph.outputs:
            if out.kind is OutputKind.SENT or out.target not in self.copy:
                self._check_leaves(out.ref, f"{out.kind} output {out.target}")
                continue
            one = self.first.get(out.target, out.target)
            ref, base = targets[out.target], targets.get(one)
            same = base is not None and (
                self.first.get(ref.name, ref.name) == base.name and ref.index == base.index
            )
            if not same or self.copy.get(ref.name) != self.copy[out.target]:
                raise self.refuse(f"{out.kind} of {out.target} is {ref}")


def match_layers(graph: Graph, fold: Fold) -> Twins:
    """The twin of everything in the two written copies. graph: with hubs, of the stage. Raises
    NotFoldable."""
    return _Matcher(graph, fold).match()


def fold_problem(built: StageProblem, graph: Graph, folds: Sequence[Fold]) -> StageProblem:
    """The program of the stage with every fold's layers counted `count` times. built: of graph as
    written. Raises NotFoldable. O(edges)."""
    return _Folder(built, [(fold, match_layers(graph, fold)) for fold in folds]).build()


class _Folder:
    """Weights and representatives of nodes (a builder, local to one call)."""

    def __init__(self, built: StageProblem, folds: Sequence[tuple[Fold, Twins]]) -> None:
        self.built, self.folds = built, folds
        self.names = [node.name for node in built.nodes]
        number = {(n.kind == "output", n.name): i for i, n in enumerate(built.nodes)}
        self.first = list(range(len(built.nodes)))  # node -> the node that stands for it
        self.copies = [
            [twins.copy.get(node.name) for node in built.nodes] for _, twins in folds
        ]  # an output has the name of what it belongs to
        for _, twins in folds:
            for two, one in twins.first.items():
                for is_output in (False, True):
                    if (is_output, two) in number:
                        self.first[number[is_output, two]] = number[is_output, one]
        for fold_copies in self.copies:
            for i, node in enumerate(built.nodes):
                if node.kind == "output" and node.name in built.sent:
                    fold_copies[i] = None
        self.products = Products()
        self.scaled: dict[tuple[int, float], FloatArray] = {}

    def build(self) -> StageProblem:
        built, problem = self.built, self.built.problem
        self._check_nodes()
        kept = [i for i, first in enumerate(self.first) if first == i]
        number = {old: new for new, old in enumerate(kept)}
        seconds = [problem.node_seconds[i] * self._node_weight(i) for i in kept]
        edges: dict[tuple[int, int], tuple[FloatArray, Part]] = {}
        for (u, v), matrix, part in zip(
            problem.edges, problem.edge_seconds, built.edge_parts, strict=True
        ):
            weight = self._edge_weight(u, v)
            if not weight:
                continue
            a, b = number[self.first[u]], number[self.first[v]]
            scaled = self._scale(matrix, weight)
            if a == b:
                seconds[a] = seconds[a] + scaled.diagonal()
                continue
            if a > b:
                a, b, scaled = b, a, self.products.transpose(scaled)
            old = edges.get((a, b))
            edges[a, b] = (scaled if old is None else self.products.add(old[0], scaled), part)
        folded = replace(
            problem,
            node_names=tuple(problem.node_names[i] for i in kept),
            node_seconds=tuple(seconds),
            node_bytes=tuple(problem.node_bytes[i] * self._node_weight(i) for i in kept),
            edges=tuple(edges),
            edge_seconds=tuple(matrix for matrix, _ in edges.values()),
            node_layers=tuple(problem.node_layers[i] for i in kept),
        )
        return replace(
            built,
            problem=folded,
            nodes=tuple(built.nodes[i] for i in kept),
            node_parts=tuple(built.node_parts[i] for i in kept),
            edge_parts=tuple(part for _, part in edges.values()),
            byte_kinds=tuple(built.byte_kinds[i] for i in kept),
            copies={
                name: Copy(number, which, fold.count)
                for number, (fold, twins) in enumerate(self.folds)
                for name, which in twins.copy.items()
            },
            twins=tuple(
                (built.nodes[i], number[first]) for i, first in enumerate(self.first) if first != i
            ),
        )

    def _check_nodes(self) -> None:
        problem = self.built.problem
        for i, first in enumerate(self.first):
            if first == i:
                continue
            one, two = self.built.nodes[first], self.built.nodes[i]
            for vectors in (problem.node_seconds, problem.node_bytes):
                if not np.array_equal(vectors[first], vectors[i]):
                    raise NotFoldable(f"{one.name} and {two.name} cost or hold different amounts")
            if one.choices != two.choices:
                raise NotFoldable(f"{one.name} and {two.name} have different choices")

    def _node_weight(self, node: int) -> float:
        return math.prod(
            (fold.count, 0)[which]
            for (fold, _), copies in zip(self.folds, self.copies, strict=True)
            if (which := copies[node]) is not None
        )

    def _edge_weight(self, u: int, v: int) -> float:
        """How often the edge is in the stage written out; 0 for what another edge stands for."""
        weight = 1.0
        for (fold, twins), copies in zip(self.folds, self.copies, strict=True):
            one, two = copies[u], copies[v]
            if one is None and two is None:
                continue
            if one is None or two is None:
                pairs = ((self.names[u], self.names[v]), (self.names[v], self.names[u]))
                if any(pair in twins.shared for pair in pairs):
                    weight *= (fold.count, 0)[one or two or 0]
            elif one != two:
                weight *= fold.count - 1
            else:
                weight *= (fold.count, 0)[one]
        return weight

    def _scale(self, matrix: FloatArray, weight: float) -> FloatArray:
        if weight == 1.0:
            return matrix
        key = (id(matrix), weight)
        if key not in self.scaled:
            self.scaled[key] = matrix * weight
        return self.scaled[key]
