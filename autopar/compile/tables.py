"""Values that Inductor would make anew in each kernel that reads them are made once.

    tables    small values that large ones read, such as the angles of rotary embeddings: the cosine
              of a table of [sequence, head size] would be taken for every row, head and layer
    sums      of two large values, read before and after a product of matrices, such as the stream
              between the blocks of a transformer: a norm would read all products since a sum was
              last in memory, and backward would be left its float32 result in place of the sum
              (gradients of ResNets' streams pass a relu, behind which they are in memory)
    operands  of products, which they read as a matrix although their dims lie permuted in memory,
              such as gradients of rotated queries: made with their dims in order, they would be
              copied for the products

Inductor writes a pointwise value into its readers. `aten.as_strided` of a value as it is makes it a
buffer that lies as it does in the graph, without a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from autopar.compile.nodes import CAST
from autopar.compile.overlap import is_heavy

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
CASTS = frozenset({CAST, aten._to_copy.default})
VIEWS = frozenset(
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
SAME_MEMORY = (VIEWS | {aten.slice.Tensor}) - {aten.clone.default}


def make_tables(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. O(edges)."""
    graph = module.graph
    dear: set[fx.Node] = set()
    for node in list(graph.nodes):
        if not is_inlined(node):
            continue
        if node.target in _DEAR or not dear.isdisjoint(node.all_input_nodes):
            dear.add(node)
        if node in dear and node.target not in VIEWS and _is_table(node):
            materialize(graph, node)
            dear.discard(node)
    return module


def make_sums(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. O(edges)."""
    before: dict[fx.Node, int] = {}  # how many products
    products = 0
    for node in module.graph.nodes:
        before[node] = products
        products += is_heavy(node)
    for node in list(before):
        if not _is_large_sum(node):
            continue
        if len({before[reader] for reader in _readers(node)}) > 1:
            materialize(module.graph, node)
    return module


def make_operands(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. O(edges)."""
    for node in list(module.graph.nodes):
        if not is_inlined(node) or node.target in VIEWS or not _is_permuted(node.meta["val"]):
            continue
        if any(is_multiplied(user) for user in node.users if _keeps_order(user)):
            materialize(module.graph, node)
    return module


def is_multiplied(node: fx.Node) -> bool:
    """Whether a product reads it as it lies in memory."""
    return any(is_heavy(u) or (_keeps_order(u) and is_multiplied(u)) for u in node.users)


def _keeps_order(node: fx.Node) -> bool:
    """Whether it is a view; a clone is one where it lies like its operand."""
    if node.target is not aten.clone.default:
        return node.target in VIEWS
    value: Tensor = node.meta["val"]
    return bool(value.stride() == node.all_input_nodes[0].meta["val"].stride())


def _is_permuted(value: Tensor) -> bool:
    """Whether it fills its memory, with its dims in another order."""
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    return not value.is_contiguous() and value.permute(order).is_contiguous()


def _is_large_sum(node: fx.Node) -> bool:
    """Whether it is the sum of two values of its own size, both of which a reader would read, as
    it is or where a mask lets it through."""
    if node.target is aten.where.self:  # the gradient of a relu of a sum
        return any(_is_large_sum(n) and len(n.users) == 1 for n in node.all_input_nodes[1:])
    if node.target is not aten.add.Tensor:
        return False
    value: Tensor = node.meta["val"]
    operands = node.all_input_nodes
    whole = len(operands) == 2 and all(_numel(n) == value.numel() for n in operands)
    return whole and (value.is_contiguous() or _is_permuted(value))


def is_inlined(node: fx.Node) -> bool:
    """Whether Inductor writes it into its readers."""
    if node.target in VIEWS or node.target in CASTS:
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
        found += _readers(user) if user.target in VIEWS else [user] if is_inlined(user) else []
    return found


def _numel(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel()


def materialize(graph: fx.Graph, node: fx.Node) -> None:
    """Makes a value that fills its memory a buffer: every reader loads it."""
    value: Tensor = node.meta["val"]
    with graph.inserting_after(node):
        args = (node, list(value.shape), list(value.stride()), 0)
        buffer = graph.call_function(aten.as_strided.default, args)
    buffer.meta["val"] = value
    node.replace_all_uses_with(buffer, delete_user_cb=lambda user: user is not buffer)
