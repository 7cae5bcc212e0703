"""Values that are a parameter, or its gradient, under another name.

Nothing has to be computed before a collective of the first, and nothing but the optimizer waits
for one of the second: in a step that is one program both run beside compute (`compile.overlap`).
"""

from __future__ import annotations

import torch

from autopar.graph.hubs import is_hub
from autopar.graph.program import Graph, InputKind, Operator, OutputKind
from autopar.graph.work import is_view


def parameter_values(graph: Graph) -> frozenset[str]:
    """Names of parameters, and of hubs and views of them that only their own layer reads: another
    one, alone, would not know what they are. O(edges)."""
    found = {i.name for i in graph.inputs_of(InputKind.PARAMETER)}
    readers = graph.readers()
    for op in graph.operators:
        if (is_hub(op) or is_view(op)) and op.operands and op.operands[0].name in found:
            layers = {reader.layer for ref in op.refs for reader in readers.get(ref, ())}
            if layers <= {op.layer}:
                found.add(op.name)
    return frozenset(found)


def gradient_values(graph: Graph) -> frozenset[str]:
    """Names of the hubs, views and casts in one layer through which the gradient of a parameter
    leaves. O(operators)."""
    operators = {op.name: op for op in graph.operators}
    found: set[str] = set()
    for out in graph.outputs_of(OutputKind.GRADIENT):
        op = last = operators.get(out.ref.name)
        while op is not None and last is not None and op.layer == last.layer and _passes_on(op):
            found.add(op.name)
            op = operators.get(op.operands[0].name)
    return frozenset(found)


def _passes_on(op: Operator) -> bool:
    cast = op.target is torch.ops.aten._to_copy.default
    return bool(op.operands) and (is_hub(op) or is_view(op) or cast)
