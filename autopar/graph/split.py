"""Backward in two: what another stage waits for (B), and what only parameter gradients need (W).

Of the backward operators of a stage graph those belong to B on which a value depends that leaves
the stage, or the new value of a buffer; the others belong to W. Zero-bubble schedules play W later
(Qi et al., ICLR 2024). Where nothing is sent back, as in the first stage, all of backward is W.
"""

from __future__ import annotations

from collections.abc import Collection

from autopar.errors import InternalError
from autopar.graph.program import Graph, InputKind, OutputKind, Phase, Ref


def weight_operators(graph: Graph) -> frozenset[str]:
    """Names of the operators of W. Post: check_split. O(edges)."""
    needed = {out.ref.name for out in graph.outputs if _is_awaited(out.kind)}
    weights = set()
    for op in reversed(graph.operators):
        if op.name in needed:
            needed.update(ref.name for ref in op.operands)
        elif op.phase is Phase.BACKWARD:
            weights.add(op.name)
    check_split(graph, weights)
    return frozenset(weights)


def check_split(graph: Graph, weights: Collection[str]) -> None:
    """Verifier: W holds backward operators only, nothing outside of W reads what W makes, and all
    that W gives away is gradients of parameters."""
    for op in graph.operators:
        if op.name in weights:
            if op.phase is not Phase.BACKWARD:
                raise InternalError(f"forward operator {op} is among those of parameter gradients")
        elif any(ref.name in weights for ref in op.operands):
            raise InternalError(f"{op} reads a value that is made after it, with the gradients")
    for out in graph.outputs:
        if out.ref.name in weights and _is_awaited(out.kind):
            raise InternalError(f"{out.kind} output {out.target!r} waits for parameter gradients")


def held_values(graph: Graph, weights: Collection[str]) -> tuple[Ref, ...]:
    """Values of one microbatch that W reads and does not make: saved, received or made by B. Graph
    inputs that stand through the step are not among them."""
    passing = {inp.name for inp in graph.inputs_of(InputKind.RECEIVED)}
    passing.update(op.name for op in graph.operators if op.name not in weights)
    read = dict.fromkeys(ref for op in graph.operators if op.name in weights for ref in op.operands)
    return tuple(ref for ref in read if ref.name in passing)


def _is_awaited(kind: OutputKind) -> bool:
    return kind in (OutputKind.SENT, OutputKind.BUFFER)
