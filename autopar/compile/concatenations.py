"""Sums that a concatenation reads as they are become buffers of their own.

Inductor gives an operand of a concatenation its part of the result to write to. Its kernels that
sum rows and columns in one pass (`triton.mix_order_reduction`, torch 2.11 to 2.13) put the sums of
the columns into new memory all the same, and that part would never be written: in packed gradients
of biases, for example. A copy of a few kilobytes avoids it.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.compile.tables import VIEWS, materialize
from autopar.errors import InternalError

aten = torch.ops.aten

_SUMS = frozenset(
    {
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.prod.default,
        aten.prod.dim_int,
    }
)


def keep_sums_apart(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. Post: check_sums."""
    for node in _concatenations(module):
        for operand in node.all_input_nodes:
            source = _source(operand)
            if source.target in _SUMS:
                materialize(module.graph, source)
    return check_sums(module)


def check_sums(module: fx.GraphModule) -> fx.GraphModule:
    """Verifier: no concatenation reads a sum but through a buffer."""
    for node in _concatenations(module):
        for operand in node.all_input_nodes:
            if _source(operand).target in _SUMS:
                raise InternalError(f"{node.name} reads the sum {operand.name} as it is")
    return module


def _concatenations(module: fx.GraphModule) -> list[fx.Node]:
    found: list[fx.Node] = module.graph.find_nodes(op="call_function", target=aten.cat.default)
    return found


def _source(node: fx.Node) -> fx.Node:
    """What it is a view of, or itself."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node
