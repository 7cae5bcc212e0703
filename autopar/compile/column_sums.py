"""Sums over the rows of what a product reads, such as gradients of biases, are made by the kernel
that writes it:

    y [N, C] = f(x)                y [N / R, R, C] = f(x as [N / R, R, ..])
    sum over n of y[n, c]    ->    sum over blocks b of (sum over r of y[b, r, c])

Inductor splits a sum of many rows, too, but into as many parts as keep a GPU busy, such as 22 of
6144 columns for 132 processors. It fuses the sum with the kernel that writes y only where a dim of
y is as long as that, and reads y once more otherwise.

f is a concatenation of columns or an operator of each element. Where it needs sums of rows, as in
the backward of a norm, its kernel walks along rows, and y stays as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import call, in_dtype
from autopar.compile.tables import VIEWS, is_inlined, is_multiplied, materialize
from autopar.ops.attention import accumulation_dtype

aten = torch.ops.aten

ROWS = 256  # of a block, at most: its sums are a small part of its bytes
LEAST_ROWS = 32
SMALL = 1 << 22  # elements of y, below which a GPU has too few columns of blocks to walk along

_SUM, _CAT, _BUFFER = aten.sum.dim_IntList, aten.cat.default, aten.as_strided.default
_OF_ROWS = frozenset({_SUM, aten.mean.dim, aten.amax.default, aten.var_mean.correction})


def sum_in_blocks(module: fx.GraphModule) -> fx.GraphModule:
    """The same values to rounding, in place. Pre: flat ATen graph with fake values. O(nodes) for
    each sum."""
    graph = module.graph
    for total in graph.find_nodes(op="call_function", target=_SUM):
        value = _summed(total)
        if value is None:
            continue
        dtype, wide = total.meta["val"].dtype, accumulation_dtype(value.meta["val"].dtype)
        blocks = _in_blocks(graph, value)
        with graph.inserting_before(total):
            parts = call(graph, _SUM, in_dtype(graph, blocks, wide), [1])
            made = call(graph, _SUM, parts, *total.args[1:])
            total.replace_all_uses_with(in_dtype(graph, made, dtype))
        graph.erase_node(total)
    return module


def _summed(total: fx.Node) -> fx.Node | None:
    """What it sums over all rows, where that may be made in blocks."""
    node = total.all_input_nodes[0]
    columns = node.meta["val"].shape[-1:]
    if node.meta["val"].ndim != 2 or total.args[1] != [0]:
        return None
    while node.target in RESHAPES:
        node = node.all_input_nodes[0]
    value = node.meta["val"]
    is_large = isinstance(value, Tensor) and value.numel() >= SMALL
    if not is_large or not value.is_floating_point() or value.shape[-1:] != columns:
        return None
    fits = _block_rows(value) >= LEAST_ROWS and _is_by_rows(node)
    return node if fits and is_multiplied(node) and not _needs_sums(node) else None


def _is_by_rows(node: fx.Node) -> bool:
    """Whether each row of it is made of the same row of its operands."""
    value: Tensor = node.meta["val"]
    if node.target is _CAT:
        by_rows = node.args[1:] in ((value.ndim - 1,), (-1,))
    else:
        by_rows = is_inlined(node) and node.target not in VIEWS
    operands = [n.meta["val"] for n in node.all_input_nodes]
    by_rows &= all(x.shape[:-1] == value.shape[:-1] for x in operands)
    return by_rows and all(x.is_contiguous() for x in [value, *operands])


def _needs_sums(node: fx.Node) -> bool:
    """Whether sums of rows are among what Inductor's kernel for it could be fused with."""
    seen = {node}
    left = [node]
    while left:
        for operand in left.pop().all_input_nodes:
            if operand.target in _OF_ROWS:
                return True
            is_fused = is_inlined(operand) or operand.target in (_CAT, _BUFFER)
            if is_fused and operand not in seen:
                seen.add(operand)
                left.append(operand)
    return False


def _in_blocks(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """The value as a buffer [blocks, rows, columns], from which its readers get its shape."""
    tensor: Tensor = value.meta["val"]
    rows = _block_rows(tensor)
    with graph.inserting_before(value):
        parts = {
            operand: call(
                graph, aten.view.default, operand, [-1, rows, operand.meta["val"].shape[-1]]
            )
            for operand in value.all_input_nodes
        }
        blocks = graph.node_copy(value, parts.__getitem__)
        blocks.meta["val"] = tensor.view(-1, rows, tensor.shape[-1])
        whole = call(graph, aten.view.default, blocks, list(tensor.shape))
    value.replace_all_uses_with(whole)
    graph.erase_node(value)
    materialize(graph, blocks)
    return next(iter(blocks.users))


def _block_rows(value: Tensor) -> int:
    return math.gcd(math.prod(value.shape[:-1]), ROWS)
