"""Collectives of local programs as torch's functional collectives: started here, waited for by
`WAIT`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autopar.errors import InternalError
from autopar.lowering.program import CollectiveOp

functional = torch.ops._c10d_functional

WAIT = functional.wait_tensor.default
STARTS: dict[Any, CollectiveOp] = {
    functional.all_reduce.default: CollectiveOp.ALL_REDUCE,
    functional.all_gather_into_tensor.default: CollectiveOp.ALL_GATHER,
    functional.reduce_scatter_tensor.default: CollectiveOp.REDUCE_SCATTER,
    functional.all_to_all_single.default: CollectiveOp.ALL_TO_ALL,
}
"""What `start` calls."""


def start(op: str, shard: Tensor, group: str, size: int, reduce: str) -> Tensor:
    """The result, not yet waited for. group, size: of the process group. InternalError for another
    op than those of CollectiveOp."""
    shard = shard.contiguous()
    if op == CollectiveOp.ALL_REDUCE:
        found = functional.all_reduce(shard, reduce, group)
    elif op == CollectiveOp.ALL_GATHER:
        found = functional.all_gather_into_tensor(shard, size, group)
    elif op == CollectiveOp.REDUCE_SCATTER:
        found = functional.reduce_scatter_tensor(shard, reduce, size, group)
    elif op == CollectiveOp.ALL_TO_ALL:
        rows = [shard.shape[0] // size] * size
        found = functional.all_to_all_single(shard, rows, rows, group)
    else:
        raise InternalError(f"no collective {op!r}")
    result: Tensor = found
    return result


def collective_of(node: fx.Node) -> tuple[CollectiveOp, str, str]:
    """(op, group, reduce) of a call that `start` made."""
    op = STARTS[node.target]
    reduces = op in (CollectiveOp.ALL_REDUCE, CollectiveOp.REDUCE_SCATTER)
    return op, str(node.args[-1]), str(node.args[1]) if reduces else "sum"
