"""The one way in which passes edit a graph: each operator is kept, or replaced by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.graph.program import Graph, Operator, Ref, TensorMeta


@dataclass(frozen=True, slots=True)
class Rewrite:
    """operators: what stands in an operator's place. results: the new value of each old result that
    is not the like-numbered result of an operator of the same name."""

    operators: tuple[Operator, ...] = ()
    results: Mapping[int, Ref] | None = None


def rewrite_graph(graph: Graph, step: Callable[[Operator], Rewrite | None]) -> Graph:
    """Apply `step` to every operator in order, operands already renamed; None keeps it.
    O(edges)."""
    renamed: dict[Ref, Ref] = {}
    operators: list[Operator] = []

    def new(ref: Ref) -> Ref:
        return renamed.get(ref, ref)

    for old in graph.operators:
        op = old.reading(new) if any(ref in renamed for ref in old.operands) else old
        change = step(op)
        if change is None:
            operators.append(op)
            continue
        operators.extend(change.operators)
        for index, ref in (change.results or {}).items():
            renamed[Ref(op.name, index)] = ref
    outputs = tuple(replace(out, ref=new(out.ref)) for out in graph.outputs)
    return replace(graph, operators=tuple(operators), outputs=outputs)


def derived(
    op: Operator, name: str, target: Any, args: tuple[Any, ...], *results: TensorMeta | None
) -> Operator:
    """An operator with the provenance of `op`."""
    return op.changed(name=name, target=target, args=args, kwargs={}, results=results)
