"""Bytes that the kernels of experts hold beside operands and results.

A row per token and chosen expert: far more than the layer's input, so that they count where those
of other kernels do not. With r = accumulation bytes / element bytes, per row and in elements:

    forward     max(H + (G + 2) F,  S)                 rows, z, act(z_0), h; then a weighted sum
    backward    2 H + max(2 (G + 2) F,  (2 G + 2) F + S)   the same for gradients too
    S           (2 + 2 r) H                            rows by expert, by slot, and accumulated
    exchanged   + 2 H forward, + 4 H backward          rows as they left and as they came
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.estimate import EXPERT_IMBALANCE
from autopar.graph.program import Operator, Ref, TensorMeta
from autopar.ops.attention import accumulation_dtype
from autopar.sharding.rules.experts import EXCHANGE
from autopar.sharding.strategy import Strategy

_FORWARD = torch.ops.autopar.experts.default
_BACKWARD = torch.ops.autopar.experts_backward.default


def has_workspace(op: Operator) -> bool:
    """Whether it is one of experts."""
    return op.target in (_FORWARD, _BACKWARD)


def workspace_bytes(
    op: Operator, strategy: Strategy, metas: Mapping[Ref, TensorMeta], sizes: tuple[int, ...]
) -> float:
    """On the busiest device; 0 for any operator that is not one of experts."""
    if not has_workspace(op):
        return 0.0
    x, index, _, up = op.operands[0 if op.target is _FORWARD else 1 :][:4]
    _, parts, width, hidden = metas[up].shape
    narrow = 1  # devices that share the width of every expert
    for factor, size in zip(strategy.factors, sizes, strict=True):
        if factor is not None and factor.name[0] == "f":
            narrow *= size
    rows = metas[index].numel / (strategy.num_splits / narrow)
    if 0 in strategy.operands[op.operands.index(up)]:
        rows *= EXPERT_IMBALANCE
    local = width / narrow
    dtype = metas[x].dtype
    wide = accumulation_dtype(dtype).itemsize / dtype.itemsize
    summed = (2 + 2 * wide) * hidden
    exchanged = 2 * hidden if strategy.axes(EXCHANGE) else 0
    if op.target is _FORWARD:
        columns = max(hidden + (parts + 2) * local, summed) + exchanged
    else:
        inner = max(2 * (parts + 2) * local, (2 * parts + 2) * local + summed)
        columns = 2 * hidden + inner + 2 * exchanged
    return float(rows * columns * dtype.itemsize)
