"""How much an operator computes and moves, whole on one device.

FLOPs come from torch's own registry (`torch.utils.flop_counter`), which counts contractions,
convolutions and attention, a multiply-add as two. Bytes are those an unfused kernel reads and
writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch.utils.flop_counter import flop_registry

from autopar.graph.program import Operator, Ref, TensorMeta, map_refs

aten = torch.ops.aten

# Views by behaviour, though their schemas do not say so.
_UNDECLARED_VIEWS = frozenset({aten._unsafe_view.default, aten.reshape.default})


# Grouped matmuls of expert layers, which torch's registry lacks.
_GROUPED_MATMUL = aten._grouped_mm.default


def is_view(op: Operator) -> bool:
    """The results alias an operand: no memory traffic on one device."""
    return _aliases(op.target)


@cache
def _aliases(target: object) -> bool:
    if target in _UNDECLARED_VIEWS:
        return True
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.returns:
        return False
    return all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def is_contraction(op: Operator) -> bool:
    """Matmuls, convolutions, attention and their gradients: what has a count of FLOPs."""
    return (
        op.target is _GROUPED_MATMUL or getattr(op.target, "overloadpacket", None) in flop_registry
    )


def operator_flops(op: Operator, metas: Mapping[Ref, TensorMeta]) -> float:
    """FLOPs of a contraction at these shapes, 0 for anything else. Attention counts its whole
    square of scores, causal or not, as torch does."""
    if not is_contraction(op):
        return 0.0
    if op.target is _GROUPED_MATMUL:
        return _grouped_flops(metas[op.args[0]].shape, metas[op.args[1]].shape)
    count = flop_registry[getattr(op.target, "overloadpacket")]  # noqa: B009 (Callable has none)

    def shape(ref: Ref) -> tuple[int, ...]:
        return metas[ref].shape  # the registry's formulas read shapes where a call has tensors

    results = tuple(None if meta is None else meta.shape for meta in op.results)
    out = results[0] if len(results) == 1 else results
    return float(count(*map_refs(op.args, shape), **map_refs(dict(op.kwargs), shape), out_val=out))


def _grouped_flops(lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Groups split the rows [M, K] x [E, K, N], the inner dim [M, K] x [K, N], or the columns
    [E, M, K] x [K, N]; or it is a plain batch [E, M, K] x [E, K, N]."""
    groups = lhs[0] if len(lhs) > len(rhs) else 1
    return 2.0 * math.prod(lhs) * rhs[-1] / groups


def operator_bytes(op: Operator, metas: Mapping[Ref, TensorMeta]) -> float:
    """Bytes read plus bytes written, each operand once; a view moves nothing."""
    if is_view(op):
        return 0.0
    written = sum(meta.nbytes for meta in op.results if meta is not None)
    read = sum(metas[ref].nbytes for ref in dict.fromkeys(op.operands))
    if op.target is aten.embedding.default:  # reads the rows that it looks up, not the whole table
        read = metas[op.args[1]].nbytes + written
    return float(read + written)
