"""The transient bytes that no solution of a stage avoids, for its lower bound.

Transients lie outside of the integer program, but not all of them: whatever the strategies, at each
moment the values that are alive hold at least the bytes of their smallest shards. Relative to what
the prediction counts (`intraop.memory_use`), at every moment t of a phase

    transient >= sum over alive, uncounted values of least(v)  -  sum over counted ones that are
                 not there at t of most(v)

with least and most over all strategies of the operator that makes v. Copies in other layouts,
workspaces and padding only add to it. So a solution that fits the budget M has its row within
M - max_t of that, and a bound of the program there is a bound for the stage.
"""

from __future__ import annotations

from autopar.graph.hubs import is_hub, is_save
from autopar.graph.program import Graph, Operator, OutputKind, Phase, Ref
from autopar.graph.work import is_view
from autopar.intraop.build import StageProblem, weight
from autopar.layout import local_share
from autopar.sharding.strategy import Strategy


def least_transient_bytes(
    graph: Graph, built: StageProblem, sizes: tuple[int, ...], num_microbatches: int
) -> float:
    """graph: that of `built`. sizes: of the mesh axes. At least 0."""
    spans = _Spans(graph, built, sizes)
    gradients = {o.ref: o.target for o in graph.outputs_of(OutputKind.GRADIENT)}
    least = 0.0
    for phase in Phase:
        counted = spans.saves()
        if phase is Phase.BACKWARD and num_microbatches == 1:
            counted |= gradients
        least = max(least, spans.phase(phase, counted))
    return least


class _Spans:
    """When values are alive, and how small and large their shards can be (a builder, local to one
    call)."""

    def __init__(self, graph: Graph, built: StageProblem, sizes: tuple[int, ...]) -> None:
        self._graph, self._copies = graph, built.copies
        self._root: dict[Ref, Ref] = {}
        self._least: dict[Ref, float] = {}
        self._most: dict[Ref, float] = {}
        choices = {n.name: n.choices for n in built.nodes if n.kind == "operator"}
        choices |= {n.name: n.choices for n, _ in built.twins if n.kind == "operator"}
        metas = graph.metas()
        for op in graph.operators:
            views = is_view(op) or is_hub(op)
            for ref in op.refs:
                source = op.operands[0] if views and op.operands else ref
                self._root[ref] = self._root.get(source, source)
                layouts = {
                    c.results[ref.index] for c in choices[op.name] if isinstance(c, Strategy)
                }
                shares = [local_share(built.dims[ref], layout, sizes) for layout in layouts]
                self._least[ref] = min(shares, default=0.0) * metas[ref].nbytes
                self._most[ref] = max(shares, default=1.0) * metas[ref].nbytes

    def saves(self) -> dict[Ref, str]:
        return {Ref(op.name): op.name for op in self._graph.operators if is_save(op)}

    def phase(self, phase: Phase, counted: dict[Ref, str]) -> float:
        """The largest of the sums above at any moment. counted: value -> whose copies it counts
        with."""
        operators = [op for op in self._graph.operators if op.phase is phase]
        own = {ref for op in operators for ref in op.refs}
        memory = {self._memory(ref, own): ref for ref in counted}
        changes = [0.0] * (len(operators) + 2)
        born, last = self._lives(operators, own)
        for root, start in born.items():
            if root not in memory:
                changes[start] += self._least.get(root, 0.0)
                changes[last[root] + 1] -= self._least.get(root, 0.0)
        for root, ref in memory.items():
            nbytes = weight(self._copies, counted[ref]) * self._most[ref]
            if root in born:  # made in this phase, and kept to its end
                changes[0] -= nbytes
                changes[born[root]] += nbytes
            elif phase is Phase.BACKWARD:  # there from the beginning to its last reader
                changes[last.get(root, 0) + 1] -= nbytes
        alive = most = 0.0
        for change in changes:
            alive += change
            most = max(most, alive)
        return most

    def _memory(self, ref: Ref, own: set[Ref]) -> Ref:
        """What holds the value in the phase whose operators make `own`: a saved value is memory of
        its own in backward."""
        root = self._root.get(ref, ref)
        return root if root in own or ref in own else ref

    def _lives(
        self, operators: list[Operator], own: set[Ref]
    ) -> tuple[dict[Ref, int], dict[Ref, int]]:
        """Number of the operator that makes each memory of the phase, and of its last reader."""
        born: dict[Ref, int] = {}
        last: dict[Ref, int] = {}
        leaves = {out.ref for out in self._graph.outputs}
        for number, op in enumerate(operators):
            for ref in op.operands:
                last[self._memory(ref, own)] = number
            for ref in op.refs:
                root = self._memory(ref, own)
                if root in own:
                    born.setdefault(root, number)
                last[root] = len(operators) if ref in leaves else max(number, last.get(root, 0))
        for ref in leaves & own:
            last[self._memory(ref, own)] = len(operators)
        return born, last
