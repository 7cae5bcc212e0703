"""Small values that large ones read, such as the angles of rotary embeddings, are made once.

Inductor writes a pointwise value into each kernel that reads it, so that the cosine of a table of
[sequence, head size] would be taken anew for every row, head and layer. `aten.as_strided` of a
value as it is makes it a buffer, without a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten

READ_AGAIN = 8  # elements that are made per element that is read

# Dozens of instructions per element, beside one or two of other pointwise operators.
_DEAR = frozenset(
    {
        aten.cos.default,
        aten.sin.default,
        aten.tan.default,
        aten.exp.default,
        aten.exp2.default,
        aten.pow.Scalar,
        aten.pow.Tensor_Tensor,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.erf.default,
    }
)
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, aten._to_copy.default})
_VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.permute.default,
        aten.clone.default,
    }
)


def make_tables(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. O(edges)."""
    graph = module.graph
    dear: set[fx.Node] = set()
    for node in list(graph.nodes):
        if not _is_inlined(node):
            continue
        if node.target in _DEAR or not dear.isdisjoint(node.all_input_nodes):
            dear.add(node)
        if node in dear and node.target not in _VIEWS and _is_table(node):
            materialize(graph, node)
            dear.discard(node)
    return module


def _is_inlined(node: fx.Node) -> bool:
    """Whether Inductor writes it into its readers."""
    if node.target in _VIEWS or node.target in _CASTS:
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_table(node: fx.Node) -> bool:
    value: Tensor = node.meta["val"]
    enough = READ_AGAIN * max(value.numel(), 1)
    return value.is_contiguous() and any(_numel(reader) >= enough for reader in _readers(node))


def _readers(node: fx.Node) -> list[fx.Node]:
    """Pointwise readers, also through views."""
    found = []
    for user in node.users:
        found += _readers(user) if user.target in _VIEWS else [user] if _is_inlined(user) else []
    return found


def _numel(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel()


def materialize(graph: fx.Graph, node: fx.Node) -> None:
    """Makes a contiguous value a buffer: every reader loads it."""
    value: Tensor = node.meta["val"]
    with graph.inserting_after(node):
        args = (node, list(value.shape), list(value.stride()), 0)
        buffer = graph.call_function(aten.as_strided.default, args)
    buffer.meta["val"] = value
    node.replace_all_uses_with(buffer, delete_user_cb=lambda user: user is not buffer)
