"""What is added to the stream between the blocks of a network is added in the kernel of the product
that makes it:

    stream + (a @ b + bias)    ->    linear_add(a, b, bias, stream)

where the sum is a buffer anyway (`compile.tables.make_sums`), so that a norm behind it reads one
value, not two, and writes one less. The product stays where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import call
from autopar.compile.overlap import is_heavy
from autopar.compile.tables import SAME_MEMORY
from autopar.ops.epilogues import linear_add_problem

aten, own = torch.ops.aten, torch.ops.autopar

_PRODUCT, _SUM, _BUFFER = aten.mm.default, aten.add.Tensor, aten.as_strided.default
_FIRST = 0  # the kernel that the heuristic puts first, unless another is chosen


class _Linear(NamedTuple):
    """a @ b + bias, of which nothing else is read. nodes: from its last one back to the product."""

    nodes: Sequence[fx.Node]
    bias: fx.Node | None

    @property
    def product(self) -> fx.Node:
        return self.nodes[-1]


def join_streams(module: fx.GraphModule) -> fx.GraphModule:
    """The same values to rounding, in place. Pre: flat ATen graph with fake values. O(nodes)."""
    graph = module.graph
    position = {node: i for i, node in enumerate(graph.nodes)}
    for total in graph.find_nodes(op="call_function", target=_SUM):
        is_buffer = [user.target for user in total.users] == [_BUFFER]
        if not is_buffer or total.kwargs or len(total.all_input_nodes) != 2:
            continue
        for value, stream in (total.args, total.args[::-1]):
            linear = _linear(value)
            if linear is not None and _is_joined(total, linear, stream, position):
                position[_joined(graph, total, linear, stream)] = position[linear.product]
                break
    module.recompile()
    return module


def _linear(node: fx.Node) -> _Linear | None:
    nodes: list[fx.Node] = []
    bias: Any = None
    while len(node.users) == 1 and not node.kwargs:
        nodes.append(node)
        if node.target is _PRODUCT:
            return _Linear(nodes, bias)
        if node.target is _SUM and bias is None:
            bias = node.args[1]
            if not isinstance(bias, fx.Node) or bias.meta["val"].ndim != 1:
                return None
        elif node.target not in RESHAPES and node.target is not aten.clone.default:
            return None
        node = node.all_input_nodes[0]
    return None


def _is_joined(
    total: fx.Node, linear: _Linear, stream: fx.Node, position: Mapping[fx.Node, int]
) -> bool:
    """Whether the sum may be made where the product stands, by a kernel that is faster."""
    value: Tensor = total.meta["val"]
    made = [node.meta["val"] for node in linear.nodes]
    others = [stream] if linear.bias is None else [stream, linear.bias]
    if any(position[node] > position[linear.product] for node in others):
        return False
    is_alike = stream.meta["val"].shape == value.shape and value.is_contiguous()
    if not is_alike or not _is_in_memory(stream):
        return False
    if any(x.dtype is not value.dtype or x.shape[-1] != value.shape[-1] for x in made):
        return False
    return linear_add_problem(*_values(_operands(linear, stream))) is not None


def _is_in_memory(node: fx.Node) -> bool:
    """Whether it is there for a kernel to read: not what Inductor writes into its readers."""
    while node.target in SAME_MEMORY:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or node.target is _BUFFER or is_heavy(node)


def _joined(graph: fx.Graph, total: fx.Node, linear: _Linear, stream: fx.Node) -> fx.Node:
    (buffer,) = total.users
    with graph.inserting_before(linear.product):
        made = call(graph, own.linear_add.default, *_operands(linear, stream), _FIRST)
    buffer.replace_all_uses_with(made)
    for node in (buffer, total, *linear.nodes):
        graph.erase_node(node)
    return made


def _operands(linear: _Linear, stream: fx.Node) -> tuple[Any, ...]:
    return (*linear.product.args, linear.bias, stream)


def _values(nodes: Sequence[fx.Node | None]) -> list[Any]:
    return [None if node is None else node.meta["val"] for node in nodes]
