"""Products of matrices take the kernel that was found to be the fastest for them.

    a @ b                         ->  product(a, b, dtype, choice)
    linear_gelu(a, b, bias, 0)    ->  linear_gelu(a, b, bias, choice),    likewise the others

The kernel is cuBLASLt's. What its heuristic puts first is mostly the fastest of its list, but up to
9 % slower than another for some sizes, such as the scores of GPT 1.3B on an H100. Products for
which the heuristic is right stay as they are, and those whose bias Inductor adds in their kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from autopar.compile.nodes import call
from autopar.compile.tables import VIEWS, is_inlined
from autopar.ops.cublaslt import Epilogue, Problem, problem_of
from autopar.ops.epilogues import (
    gelu_gradient_problem,
    linear_add_problem,
    linear_gelu_problem,
)

aten, own = torch.ops.aten, torch.ops.autopar

Choose = Callable[[Problem], int]
"""The number of the fastest kernel, of `cublaslt.num_kernels`; the same on all ranks whose GPUs are
of one kind, as kernels may sum in different orders."""

_PRODUCT, _WIDE, _SUM = aten.mm.default, own.wide_product.default, aten.add.Tensor
_JOINED: Mapping[Any, Callable[..., Problem | None]] = {
    own.linear_gelu.default: linear_gelu_problem,
    own.gelu_gradient.default: gelu_gradient_problem,
    own.linear_add.default: linear_add_problem,
}


def choose_kernels(module: fx.GraphModule, choose: Choose) -> fx.GraphModule:
    """The same values to rounding, in place. Pre: flat ATen graph with fake values. O(nodes)."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target in _JOINED:
            *operands, _ = node.args
            choice = _chosen(_JOINED[node.target](*_values(operands)), choose)
            node.args = (*operands, choice)
        elif node.target in (_PRODUCT, _WIDE):
            _replace(graph, node, choose)
    module.recompile()
    return module


def _replace(graph: fx.Graph, node: fx.Node, choose: Choose) -> None:
    if _is_joined_with_sum(node):
        return
    left, right = node.args[:2]
    dtype = node.meta["val"].dtype
    a, b = _values((left, right))
    choice = _chosen(problem_of(a, b, Epilogue.NONE, dtype), choose)
    if not choice:
        return
    with graph.inserting_before(node):
        made = call(graph, own.product.default, left, right, dtype, choice)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _chosen(problem: Problem | None, choose: Choose) -> int:
    return 0 if problem is None else choose(problem)


def _is_joined_with_sum(node: fx.Node) -> bool:
    """Whether Inductor makes a sum in the product's kernel: it has another one for it where all
    that reads it is elementwise."""
    (reader,) = node.users if len(node.users) == 1 else (None,)
    if reader is None or reader.target is not _SUM:
        return False
    return not all(map(_is_elementwise, reader.users))


def _is_elementwise(node: fx.Node) -> bool:
    if node.target in VIEWS:
        return all(map(_is_elementwise, node.users))
    return is_inlined(node)


def _values(nodes: Any) -> list[Any]:
    """Of operands, of which a bias may be None."""
    return [None if node is None else node.meta["val"] for node in nodes]
