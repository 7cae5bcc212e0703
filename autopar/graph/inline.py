"""Which forward values compiled code does not hold: it computes them in whatever reads them.

Inductor writes a pointwise operator into every kernel that reads it, so that readers in backward
read what the value is made of (`StorageBox.realize_hint` and `mark_reuse` in torch/_inductor/ir.py,
torch 2.13, without its rule for CPUs). A value is held where

    it is not pointwise            a product, a reduction, attention, a gather of rows
    a product, say, reads it       any kernel that cannot compute its operands; but for attention
                                   what is made of one held value alone is copied at each read
    it would cost too much anew    more than MOST_READS held values, or MOST_OPERATORS operators

Values of other layers count as held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import autopar.ops  # noqa: F401  (registers autopar::cross_entropy)
from autopar.graph.program import Graph, Operator, Phase, Ref
from autopar.graph.work import is_view

aten = torch.ops.aten

MOST_READS = 4  # torch._inductor.config.realize_reads_threshold
MOST_OPERATORS = 30  # torch._inductor.config.realize_opcount_threshold

_POINTWISE = frozenset({aten._to_copy.default})  # without torch's tag

# Kernels of Inductor's own, which compute what they read.
_COMPUTE_OPERANDS = frozenset(
    {
        aten.mean.dim,
        aten.mean.default,
        aten.sum.dim_IntList,
        aten.sum.default,
        aten.amax.default,
        aten.var_mean.correction,
        aten.linalg_vector_norm.default,
        aten.native_layer_norm.default,
        aten._fused_rms_norm.default,
        aten.native_group_norm.default,
        aten._native_batch_norm_legit_functional.default,
        aten._softmax.default,
        aten._safe_softmax.default,
        aten._log_softmax.default,
        aten.cat.default,
        aten.constant_pad_nd.default,
        torch.ops.autopar.cross_entropy.default,
        torch.ops.autopar.dropout.default,
    }
)
# Asks for operands with strides of its own: what is in no memory yet is written for each call.
_COPIES_OPERANDS = frozenset(
    {torch.ops.autopar.sdpa.default, torch.ops.autopar.sdpa_dropout.default}
)


def is_pointwise(op: Operator) -> bool:
    tags = getattr(op.target, "tags", ())
    return op.target in _POINTWISE or torch.Tag.pointwise in tags


def inlined(graph: Graph) -> frozenset[str]:
    """Names of the forward operators whose value is not held. Pre: layers are set. O(edges)."""
    forward = [op for op in graph.operators if op.phase is Phase.FORWARD]
    wanted, copied = _wanted(graph, forward)
    layers = {ref: op.layer for op in forward for ref in op.refs}
    made_of: dict[Ref, frozenset[Ref]] = {}  # of values that are not held themselves
    size: dict[Ref, int] = {}  # operators that make one
    found: set[str] = set()
    for op in forward:
        own = [ref for ref in op.operands if layers.get(ref) == op.layer]
        held = frozenset().union(*(made_of.get(r, {r}) if r in own else {r} for r in op.operands))
        if is_view(op):
            made_of.update(dict.fromkeys(op.refs, held))
            size.update(dict.fromkeys(op.refs, sum(size.get(ref, 0) for ref in own)))
            continue
        if not (is_pointwise(op) and op.operands) or len(op.refs) != 1:
            continue
        (ref,) = op.refs
        count = 1 + sum(size.get(r, 0) for r in own)
        needed = ref in wanted or (ref in copied and len(held) > 1)
        if not needed and len(held) <= MOST_READS and count <= MOST_OPERATORS:
            made_of[ref], size[ref] = held, count
            found.add(op.name)
    return frozenset(found)


def _wanted(graph: Graph, forward: Sequence[Operator]) -> tuple[set[Ref], set[Ref]]:
    """What leaves or a kernel reads that does not compute it, itself or as a view; and what is read
    so by one that may copy it."""
    wanted = {out.ref for out in graph.outputs}
    copied: set[Ref] = set()
    for op in reversed(forward):
        if is_view(op):
            for values in (wanted, copied):
                if not values.isdisjoint(op.refs):
                    values.update(op.operands)
        elif op.target in _COPIES_OPERANDS:
            copied.update(op.operands)
        elif not (is_pointwise(op) or op.target in _COMPUTE_OPERANDS):
            wanted.update(op.operands)
    return wanted, copied
