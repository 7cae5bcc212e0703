"""Gradients of weights leave their product in the type that they are kept in.

    float32(bfloat16(a @ b))  ->  a @ b in float32,    a result that nothing else reads

The product has summed in float32. Rounded and cast back, a gradient would be written and read once
more, and lose what optimizers with float32 states could use.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

import autopar.ops  # noqa: F401  (registers autopar::wide_product)
from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import CAST, call
from autopar.compile.tables import SAME_MEMORY

aten, own = torch.ops.aten, torch.ops.autopar

_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default})
_NARROW = frozenset({torch.bfloat16, torch.float16})


def widen_gradients(module: fx.GraphModule) -> fx.GraphModule:
    """The same values to the rounding of the narrow type, in place. Pre: flat ATen graph with fake
    values. O(nodes)."""
    for cast in module.graph.find_nodes(op="call_function", target=CAST):
        value: Tensor = cast.meta["val"]
        if value.dtype is torch.float32 and value.is_contiguous() and _is_result(cast):
            _widen(module.graph, cast)
    module.recompile()
    return module


def _is_result(node: fx.Node) -> bool:
    """Whether the graph returns it, in some shape, and nothing else reads it."""
    readers = [user for user in node.users if user.op != "output"]
    return all(reader.target in RESHAPES and _is_result(reader) for reader in readers)


def _widen(graph: fx.Graph, cast: fx.Node) -> None:
    views: list[fx.Node] = []
    (source,) = narrow = cast.all_input_nodes
    while len(source.users) == 1 and source.target in SAME_MEMORY:
        views.append(source)
        source = source.all_input_nodes[0]
    is_product = source.target in _PRODUCTS and source.meta["val"].dtype in _NARROW
    if not is_product or len(source.users) > 1 or not narrow[0].meta["val"].is_contiguous():
        return
    with graph.inserting_before(source):
        made = call(graph, own.wide_product.default, *source.args, torch.float32)
    for view in reversed(views):
        with graph.inserting_before(view):
            made = call(graph, view.target, made, *view.args[1:])
    cast.replace_all_uses_with(made)
    for old in (cast, *views, source):
        graph.erase_node(old)
