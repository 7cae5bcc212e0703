"""Gradients of weights leave what makes them without a cast behind it.

    float32(bfloat16(a @ b))  ->  a @ b in float32,    a result that nothing else reads

The product has summed in float32. Rounded and cast back, a gradient would be written and read once
more, and lose what optimizers with float32 states could use.

    float32(row-major(convolution's))  ->  convolution's

cuDNN sums in float32, too, but gives what it rounded, and with channels last. That is the same
value, in half the bytes, and `runtime.gradients` reads it as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import CAST, call
from autopar.compile.tables import SAME_MEMORY
from autopar.ops.products import NARROW_PRODUCTS

aten, own = torch.ops.aten, torch.ops.autopar

_COPIES = frozenset({CAST, aten.clone.default})
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


def leave_narrow(module: fx.GraphModule, gradients: Collection[int]) -> fx.GraphModule:
    """Returns gradients of convolutions' weights in the type and order in which these make them, in
    place. gradients: positions of results whose reader takes either, as `runtime.gradients` does.
    Pre: flat ATen graph with fake values. O(gradients)."""
    output = module.graph.output_node()
    results: Any = output.args[0]
    made = [_unwidened(n) if i in gradients else n for i, n in enumerate(results)]
    output.args = (tuple(made),)
    for old, new in zip(results, made, strict=True):
        while old is not new and not old.users:
            (source,) = old.all_input_nodes
            module.graph.erase_node(old)
            old = source
    module.recompile()
    return module


def _unwidened(result: fx.Node) -> fx.Node:
    """What a convolution made for its weight, if this is the same value in a wider type and maybe
    other strides, and nothing else reads it."""
    node = result
    while node.target in _COPIES and len(node.users) == 1:
        node = node.all_input_nodes[0]
    if node.target is not operator.getitem or node.args[1] != 1 or len(node.users) > 1:
        return result
    of_weight = node.all_input_nodes[0].target == aten.convolution_backward.default
    return node if of_weight and node.meta["val"].dtype in _NARROW else result


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
    is_product = source.target in NARROW_PRODUCTS and source.meta["val"].dtype in _NARROW
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
