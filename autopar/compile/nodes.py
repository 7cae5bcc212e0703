"""Nodes of flat ATen graphs with fake values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

CAST = torch.ops.prims.convert_element_type.default


def nbytes(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel() * value.itemsize


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new node where the graph inserts, with its fake value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def in_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value in this type."""
    return node if node.meta["val"].dtype is dtype else call(graph, CAST, node, dtype)
