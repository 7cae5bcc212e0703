"""Which operators of a stage make up each program of a microbatch, and what it leaves for the next.

    forward     the forward operators; leaves the saved values
    backward    the backward operators, or, where backward is split, those that others wait for;
                then it leaves what the third part reads
    weights     only where backward is split: what parameter gradients need and nothing else

What crosses from one part to a later one is made in one layout and read in that one.
"""

from __future__ import annotations

from typing import NamedTuple

from autopar.graph.hubs import is_save
from autopar.graph.program import Graph, Operator, Phase, Ref
from autopar.graph.split import held_values, weight_operators

_LEFT_SUFFIX = "__held"  # what backward leaves: the same value may also be sent, in another layout


class Part(NamedTuple):
    """Operators of one program. passes: graph inputs of this phase that are outputs as well leave
    with it. leaves: values that it makes for later parts."""

    operators: tuple[Operator, ...]
    passes: Phase | None
    leaves: tuple[Ref, ...]


def parts_of(graph: Graph, *, split: bool) -> tuple[Part, ...]:
    """Forward and backward, or forward and both parts of backward. O(edges)."""
    weights = weight_operators(graph) if split else frozenset()
    forward = tuple(op for op in graph.operators if op.phase is Phase.FORWARD)
    backward = tuple(op for op in graph.operators if op.phase is Phase.BACKWARD)
    awaited = tuple(op for op in backward if op.name not in weights)
    saved = tuple(Ref(op.name) for op in forward if is_save(op))
    made = {op.name for op in awaited}
    left = tuple(ref for ref in held_values(graph, weights) if ref.name in made)
    parts = (Part(forward, Phase.FORWARD, saved), Part(awaited, Phase.BACKWARD, left))
    if not split:
        return parts
    return (*parts, Part(tuple(op for op in backward if op.name in weights), None, ()))


def left_key(maker: Operator, ref: Ref) -> str:
    """The name under which one program gives a value to a later one."""
    return maker.name if maker.phase is Phase.FORWARD else f"{ref}{_LEFT_SUFFIX}"
