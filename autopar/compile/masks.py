"""Where a relu let its gradient through is found by what backward reads anyway.

    relu(norm(x)) <= 0    ->  norm(x) made anew,  if `x` is the one large value that it is made of
                              and backward reads `x`

The result of a relu is a buffer, as the next product reads it. Backward would load it for the mask
in each kernel that reads the masked gradient: the sums of a batch norm's backward, and the gradient
that follows them. Both load `x`, too. The operators are those of forward, in the same order; a
compiler may still round them otherwise in another kernel, so that a mask can differ where norm(x)
is within rounding of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from autopar.compile.tables import CASTS, VIEWS, is_inlined

aten = torch.ops.aten

SMALL = 64  # elements of the result of a relu per element of a value that counts as small


def remake_masks(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. O(edges)."""
    graph = module.graph
    index = {node: i for i, node in enumerate(graph.nodes)}
    for mask in graph.find_nodes(op="call_function", target=aten.le.Scalar):
        relu = mask.args[0]
        chain = _chain(relu) if relu.target is aten.relu.default else None
        if chain is None:
            continue
        source = next(n for n in _large_operands(chain, relu) if n not in chain)
        if any(index.get(reader, 0) > index[mask] for reader in _readers(source)):
            for masked in list(mask.users):
                _copy_for_readers(graph, [*chain, mask], masked)
    return module


def _copy_for_readers(graph: fx.Graph, chain: list[fx.Node], masked: fx.Node) -> None:
    """Each reader gets a value of its own: Inductor would make a buffer of one that several read,
    as it is made of more than a few values. A gradient stays where it is a buffer in any case, or
    is made of others by each reader already."""
    if masked.target is not aten.where.self:
        return
    last, chain = masked, [*chain, masked]
    while len(last.users) == 1 and next(iter(last.users)).target in CASTS:
        last = next(iter(last.users))
        chain.append(last)
    gradients = [n for n in _large_operands([masked], masked) if n not in chain]
    readers = list(last.users)
    fused = all(is_inlined(n) or n.target is aten.sum.dim_IntList for n in readers)
    if not (fused and all(map(_is_in_memory, gradients))):
        return
    for reader in readers:
        with graph.inserting_before(reader):
            reader.replace_input_with(last, _copied(graph, chain))
    for node in reversed(chain):
        if not node.users:
            graph.erase_node(node)


def _copied(graph: fx.Graph, chain: list[fx.Node]) -> fx.Node:
    """The last of them, made anew."""
    made: dict[fx.Node, fx.Node] = {}
    for node in chain:
        made[node] = graph.node_copy(node, lambda n: made.get(n, n))
    return made[chain[-1]]


def _chain(last: fx.Node) -> list[fx.Node] | None:
    """The large pointwise operators that lead to it from one large value in memory, in their
    order; None where they read several such values."""
    found: dict[fx.Node, None] = {}
    sources: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if not is_inlined(node):
            sources.add(node)
        else:
            found[node] = None
            waiting += [n for n in _large_operands([node], last) if n not in found]
        if len(sources) > 1:
            return None
    return sorted(found) if len(sources) == 1 else None


def _is_in_memory(node: fx.Node) -> bool:
    """Or a cast of what is."""
    while node.target in VIEWS or node.target in CASTS:
        node = node.all_input_nodes[0]
    return not is_inlined(node)


def _large_operands(nodes: list[fx.Node], like: fx.Node) -> list[fx.Node]:
    value: Tensor = like.meta["val"]
    operands = [n for node in nodes for n in node.all_input_nodes]
    return [n for n in operands if SMALL * n.meta["val"].numel() > value.numel()]


def _readers(node: fx.Node) -> list[fx.Node]:
    """Pointwise operators that read it, also through views and casts."""
    found = []
    for user in node.users:
        if user.target in VIEWS or user.target in CASTS:
            found += _readers(user)
        elif is_inlined(user):
            found.append(user)
    return found
