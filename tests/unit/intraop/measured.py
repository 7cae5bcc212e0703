"""Bytes that the executor of one rank really holds, moment by moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.graph.program import Graph, InputKind
from autopar.layout import local_shape
from autopar.lowering.lower import LoweredPlan, lower_plan
from autopar.lowering.program import CollectiveOp
from autopar.mesh import LogicalMesh
from autopar.plan import ParallelPlan
from autopar.runtime.executor import RowPlayer, StageExecutor, StepInputs
from autopar.runtime.inputs import whole_feed
from autopar.runtime.interpreter import Shards, interpreter
from autopar.runtime.simulated import owned


class LonelyRank:
    """Collectives of one rank that has no peers: results have the right shape, in own memory."""

    def __init__(self, mesh: LogicalMesh) -> None:
        self._mesh = mesh

    def run(self, op: str, shards: Shards, axis: int, reduce: str) -> Shards:
        (mine,) = shards
        n = self._mesh.axis_sizes[axis]
        if op == CollectiveOp.ALL_GATHER:
            return [torch.cat([mine] * n)]
        if op == CollectiveOp.REDUCE_SCATTER:
            return [mine[: len(mine) // n].clone()]
        return [mine.clone()]

    def exchange(self, rows: Shards, sends: Shards, receives: Shards, axis: int) -> Shards:
        return [rows[0][: int(sends[0].sum())].clone()]


class NoTransport:
    def begin(self, *, trains: bool) -> None:
        del trains

    def send(self, transfers: Any, values: Any, action: Any) -> None:
        raise AssertionError("one stage sends nothing")

    def receive(self, transfers: Any, action: Any) -> list[Shards]:
        del action
        assert not transfers
        return []


class LiveBytes(TorchDispatchMode):
    """The largest sum of storages alive that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return results


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(graph: Graph, plan: ParallelPlan, leaves: Sequence[Tensor]) -> float:
    """Parameters at rest on the device, and everything that one step of rank 0 of a single stage
    makes."""
    lowered: LoweredPlan = lower_plan(graph, plan)
    (stage,) = lowered.stages
    device = torch.device("cpu")
    executor = StageExecutor(
        lowered,
        graph,
        0,
        ranks=[0],
        players=interpreter([stage.mesh.coordinates(0)], LonelyRank(stage.mesh), device),
        transport=NoTransport(),
        device=device,
    )

    def filled(dims: Any, layout: Any, dtype: torch.dtype) -> Shards:
        return [torch.rand(local_shape(dims, layout, stage.mesh.axis_sizes)).to(dtype)]

    parameters = {p.name: filled(p.dims, p.rest, p.rest_meta.dtype) for p in owned(stage)}
    buffers = {
        i.name: [torch.zeros(i.meta.shape, dtype=i.meta.dtype)]
        for i in graph.inputs_of(InputKind.BUFFER)
    }
    batch = graph.inputs_of(InputKind.BATCH)
    feed = whole_feed(
        {i.name: leaf for i, leaf in zip(batch, leaves, strict=True)},
        {i.name: i.meta for i in batch},
        plan.num_microbatches,
    )
    on_host = {p.name for p in owned(stage) if p.host}
    at_rest = sum(t.nbytes for n, v in parameters.items() if n not in on_host for t in v)
    with LiveBytes() as live:
        inputs = StepInputs(parameters, buffers, feed, 0)
        RowPlayer(lowered.schedule.actions[0], {0: executor}, {0: inputs}).play()
    return at_rest + live.peak
