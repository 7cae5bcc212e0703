"""Max-pools over rows and columns keep where in its window each maximum is, in place of where in
the image.

    y, indices = max_pool2d_with_indices(x)          ->  y, offsets = autopar::max_pool(x)
    max_pool2d_with_indices_backward(g, x, indices)  ->  autopar::max_pool_backward(g, offsets)

An offset is a byte, an index eight; and ATen's backward reads x for nothing but its size.

    threshold_backward(max_pool_backward(g), x)      ->  max_pool_backward(threshold_backward(g, y))

A relu before a pool finds its mask in x. But an element that gets a gradient is the maximum of the
window that it gets it from, so that y says the same, bit for bit: it is smaller, and what follows
often keeps it anyway. x is then free after the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import autopar.ops  # noqa: F401  (registers autopar::max_pool)
from autopar.graph.program import Graph, Operator, Ref, TensorMeta
from autopar.graph.rewrite import Rewrite, derived, rewrite_graph

aten, own = torch.ops.aten, torch.ops.autopar

MOST = 25  # elements of a window of which Inductor finds the offset, and loops of our gradient

_POOL = aten.max_pool2d_with_indices.default
_GRADIENT = aten.max_pool2d_with_indices_backward.default
_MASK = aten.threshold_backward.default


def pools_by_offsets(graph: Graph) -> Graph:
    """Rewrites pools of floating values with windows and steps of at most MOST elements, whose
    indices nothing but their own gradient reads. O(edges)."""
    metas = graph.metas()
    readers = graph.readers()
    outputs = {out.ref for out in graph.outputs}

    def fits(pool: Operator) -> bool:
        indices = Ref(pool.name, 1)
        small = max(map(math.prod, _sizes(*pool.args[1:])[:2])) <= MOST
        private = indices not in outputs and all(_is_of(r, pool) for r in readers.get(indices, ()))
        return small and private and metas[pool.args[0]].dtype.is_floating_point

    chosen = {op.name for op in graph.operators if op.target is _POOL and fits(op)}

    def step(op: Operator) -> Rewrite | None:
        if op.name in chosen:
            (x, *geometry), (y, _) = op.args, op.results
            assert y is not None
            args = (x, *_sizes(*geometry), _rounds_up(geometry))
            results = (y, TensorMeta(y.shape, torch.int8))
            return Rewrite((derived(op, op.name, own.max_pool.default, args, *results),))
        if op.target is _GRADIENT and op.args[7].name in chosen:
            grad, x, *geometry, _, offsets = op.args
            args = (grad, offsets, [*metas[x].shape[-2:]], *_sizes(*geometry))
            target = own.max_pool_backward.default
            return Rewrite((derived(op, op.name, target, args, *op.results),))
        return None

    return rewrite_graph(graph, step)


def masks_before_pools(graph: Graph) -> Graph:
    """Rewrites the gradient of a pool by offsets whose only reader is the gradient of the relu that
    the pool reads. Both stay partners of the pool. O(edges)."""
    metas = graph.metas()
    readers = graph.readers()
    pools = {op.name: op for op in graph.operators if op.target is own.max_pool.default}
    outputs = {out.ref for out in graph.outputs}
    waiting: dict[Ref, Operator] = {}

    def moves(back: Operator) -> bool:
        pool, result = pools.get(back.args[1].name), Ref(back.name)
        if pool is None or result in outputs or len(readers.get(result, ())) != 1:
            return False
        (reader,) = readers[result]
        return reader.target is _MASK and reader.args[:2] == (result, pool.args[0])

    def step(op: Operator) -> Rewrite | None:
        if op.target is own.max_pool_backward.default and moves(op):
            waiting[Ref(op.name)] = op
            return Rewrite()
        if op.target is not _MASK or op.args[0] not in waiting:
            return None
        back = waiting.pop(op.args[0])
        grad, offsets, *geometry = back.args
        args = (grad, Ref(offsets.name), op.args[2])
        masked = derived(back, op.name, _MASK, args, metas[grad])
        spread = back.changed(args=(Ref(op.name), offsets, *geometry))
        return Rewrite((masked, spread), {0: Ref(back.name)})

    return rewrite_graph(graph, step)


def _is_of(reader: Operator, pool: Operator) -> bool:
    """Whether it is the gradient of that very pool."""
    if reader.target is not _GRADIENT:
        return False
    _, x, *geometry, indices = reader.args
    of_pool = (pool.args[0], _sizes(*pool.args[1:]), _rounds_up(pool.args[1:]), Ref(pool.name, 1))
    return of_pool == (x, _sizes(*geometry), _rounds_up(geometry), indices)


def _sizes(
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    _ceil_mode: bool = False,
) -> list[list[int]]:
    """Kernel, stride, padding and dilation, of rows and columns: one number is for both, and no
    stride is that of the kernel."""
    return [[each[0], each[-1]] for each in (kernel, stride or kernel, padding, dilation)]


def _rounds_up(geometry: Sequence[Any]) -> bool:
    return bool(geometry[4]) if len(geometry) > 4 else False
