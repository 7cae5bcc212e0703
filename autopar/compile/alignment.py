"""Products of matrices whose sizes the fast kernels refuse are padded, as with a vocabulary of
50257: tensor cores want rows that start at a multiple of 16 bytes.

    a[m, k] @ b[k, n]  =  (pad(a) @ pad(b))[:m, :n]        padded with zeros

The zeros of an operand are written by the kernel that makes it, if Inductor makes it; the result
is a view. Products that read one value share its padding. `aligned_product` is a product whose
readers want to know of that view when they are traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autopar.compile.nodes import call

aten = torch.ops.aten

ALIGN_BYTES = 16
PAD_BYTES = 128  # a line of the cache: what is padded anyway is padded to whole ones
PAD = aten.constant_pad_nd.default
SMALL_PRODUCT = 1 << 27  # m k n below which it does not matter


def pad_products(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place. Pre: flat ATen graph with fake values. O(nodes)."""
    padder = _Padder(module.graph)
    for node in list(module.graph.nodes):
        if node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
            padder.pad(node)
    return module


def aligned_product(a: Tensor, b: Tensor) -> Tensor:
    """Decomposition of `autopar::aligned_product`: each row of the result is aligned."""
    more = _missing(b.shape[1], a.itemsize)
    if not more or a.shape[0] * b.shape[0] * b.shape[1] < SMALL_PRODUCT:
        return torch.mm(a, b)
    if b.stride(0) == 1:
        padded = PAD(b.t(), [0, 0, 0, more], 0.0).t()
    else:
        padded = PAD(b, [0, more, 0, 0], 0.0)
    product: Tensor = aten.slice.Tensor(torch.mm(a, padded), 1, 0, b.shape[1])
    return product


class _Padder:
    """The paddings that there are in one graph, by source and sizes: those that it came with, too,
    of `aligned_product` or the model itself."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._padded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        for node in graph.find_nodes(op="call_function", target=PAD):
            source, pads = node.args[:2]
            more = tuple(pads[1::2])[::-1]
            if not any(pads[::2]) and node.args[2:] == (0.0,):
                self._padded[_untransposed(source), more] = node

    def pad(self, node: fx.Node) -> None:
        *bias, left, right = node.args
        (m, k), n = _shape(left), _shape(right)[1]
        itemsize = node.meta["val"].itemsize
        more_m, more_k, more_n = (_missing(size, itemsize) for size in (m, k, n))
        if not (more_m or more_k or more_n) or m * k * n < SMALL_PRODUCT:
            return
        operands = [
            self._pad(left, (more_m, more_k), node),
            self._pad(right, (more_k, more_n), node),
        ]
        if bias:
            sizes = _shape(bias[0])
            more = (more_m, more_n)[-len(sizes) :]
            wide = tuple(0 if size == 1 else more for size, more in zip(sizes, more, strict=True))
            operands.insert(0, self._pad(bias[0], wide, node))
        product = self._call(node, node.target, *operands)
        if more_m:
            product = self._call(node, aten.slice.Tensor, product, 0, 0, m)
        if more_n:
            product = self._call(node, aten.slice.Tensor, product, 1, 0, n)
        node.replace_all_uses_with(product)
        self._graph.erase_node(node)

    def _pad(self, value: Any, more: tuple[int, ...], before: fx.Node) -> fx.Node:
        """A transposed value is padded as it lies in memory."""
        if not any(more):
            padded: fx.Node = value
            return padded
        if value.target is aten.permute.default and list(value.args[1]) == [1, 0]:
            source = self._pad(value.args[0], more[::-1], before)
            return self._call(before, aten.permute.default, source, [1, 0])
        known = self._padded.get((value, more))
        if known is None or before < known:  # the model's own may come later
            pads = [size for last in reversed(more) for size in (0, last)]
            known = self._call(before, PAD, value, pads, 0.0)
            self._padded[value, more] = known
        return known

    def _call(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self._graph.inserting_before(before):
            return call(self._graph, target, *args)


def _untransposed(node: fx.Node) -> fx.Node:
    """What a value is that was transposed twice."""
    before = node.all_input_nodes[:1]
    twice = before and all(
        n.target is aten.permute.default and n.args[1] == [1, 0] for n in (node, *before)
    )
    return _untransposed(before[0].all_input_nodes[0]) if twice else node


def _shape(node: Any) -> torch.Size:
    value: Tensor = node.meta["val"]
    return value.shape


def _missing(size: int, itemsize: int) -> int:
    """Elements up to whole lines, if rows of `size` elements are not aligned."""
    if size * itemsize % ALIGN_BYTES == 0:
        return 0
    return -size % (PAD_BYTES // itemsize)
