"""Program facts to seconds and bytes: what operators and reshards cost on one logical mesh.

    operator   roofline of its local FLOPs and bytes, plus the collectives that a composite adds;
               experts that are sharded wait for the device with the most rows
    reshard    the affine costs of its steps (sharding.reshard), and the copies that transposes need
    parameter  once-per-step gather and optimizer, bytes at rest; the way to a host and back; of
               its collectives what the compute beside them does not hide

Seconds per microbatch unless a name says step; bytes per device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopar.graph.hubs import is_hub
from autopar.graph.program import Operator, Ref, TensorMeta
from autopar.graph.work import is_contraction, is_view, operator_bytes, operator_flops
from autopar.layout import PARTIAL, Dims, Layout, has_uneven, leaves_padding, local_share
from autopar.mesh import LogicalMesh
from autopar.sharding.reshard import StepKind, reshard_steps
from autopar.sharding.rule import Call, Rule
from autopar.sharding.rules.experts import EXCHANGE
from autopar.sharding.strategy import Strategy
from cost_models import (
    AffineCost,
    Cluster,
    CollectiveKind,
    collective_coefficients,
    matmul_s,
    pointwise_s,
)

FloatArray = NDArray[np.float64]

# Share of a pointwise operator's traffic that is left once a compiler has fused it with a
# neighbour: each value is either read or written by the fused kernel, not both. An assumption, not
# a measurement.
POINTWISE_FUSION = 0.5

# Share of its seconds by which a collective inside a node lengthens a compiled step that is one
# program, where nothing waits for it but a parameter's first use, or the optimizer for a gradient.
# Of six such plans on 2 H100 with NVLink (benchmarks/results/speed-20261122-h100.md) these took 85
# ms as predicted, and 14 ms of communication were exposed beyond what was predicted for
# activations: 0.16, between 0 and 0.6 of a plan. The rest is assumed, for compute beside a
# collective is slower. Where collectives take longer than the compute beside them, more is exposed.
EXPOSED_SHARE = 0.35

_COLLECTIVE = {
    StepKind.REDUCE_SCATTER: CollectiveKind.REDUCE_SCATTER,
    StepKind.ALL_REDUCE: CollectiveKind.ALL_REDUCE,
    StepKind.ALL_TO_ALL: CollectiveKind.ALL_TO_ALL,
    StepKind.ALL_GATHER: CollectiveKind.ALL_GATHER,
}

# Small all-reduces inside a composite: (lowering, operator) -> (how many, of what).
_aten = torch.ops.aten
_COMPOSITE_REDUCES: Mapping[object, int] = {
    _aten._log_softmax.default: 2,
    _aten._log_softmax_backward_data.default: 1,
    torch.ops.autopar.cross_entropy.default: 2,
    _aten._native_batch_norm_legit_functional.default: 2,
    _aten.native_batch_norm_backward.default: 2,
}


# Rows on the busiest device over their mean, where experts are sharded. An assumption: models train
# with a loss that balances their routing, which keeps it near even, not even.
EXPERT_IMBALANCE = 1.2

# operator -> (position of x, tables of its width that an exchange sends, and that it sends back)
_EXCHANGED: Mapping[object, tuple[int, int, int]] = {
    torch.ops.autopar.experts.default: (0, 1, 1),
    torch.ops.autopar.experts_backward.default: (1, 2, 1),
}


@dataclass(frozen=True, slots=True)
class OptimizerModel:
    """What the optimizer keeps and moves per parameter element.

    Defaults are AdamW's with fp32 states: two moments kept; parameter, gradient and both moments
    read, parameter and both moments written, 4 bytes each (Loshchilov & Hutter, ICLR 2019).
    """

    state_bytes_per_element: float = 8.0
    moved_bytes_per_element: float = 28.0


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exchanges_rows(op: Operator) -> bool:
    """Whether it may send rows between devices in numbers that are values."""
    return op.target in _EXCHANGED


class MeshCosts:
    """Costs on one logical mesh of one cluster. Caches what repeats; the results are pure."""

    def __init__(
        self, cluster: Cluster, mesh: LogicalMesh, optimizer: OptimizerModel = OptimizerModel()
    ) -> None:
        self.cluster = cluster
        self.mesh = mesh
        self.optimizer = optimizer
        self.device = cluster.groups[mesh.group].device
        self._reshards: dict[tuple[Dims, Layout, Layout, float], AffineCost] = {}
        self._tables: dict[Any, tuple[FloatArray, FloatArray]] = {}
        self._seconds: dict[tuple[Call, int], tuple[Sequence[Strategy], FloatArray]] = {}
        self._collectives: dict[tuple[CollectiveKind, int], AffineCost] = {}
        self._copy_s_per_byte = 1.0 / (
            self.device.memory_efficiency * self.device.memory_bandwidth_bytes_per_s
        )

    # ---- operators

    def operator_seconds(
        self,
        op: Operator,
        call: Call,
        rule: Rule,
        choices: Sequence[Strategy],
        metas: Mapping[Ref, TensorMeta],
    ) -> FloatArray:
        """Seconds of each strategy: local work, filling its padding, a composite's own
        collectives. Read only: calls of one signature share it."""
        if is_view(op) or is_hub(op) or op.inlined:
            return np.zeros(len(choices))
        known = self._seconds.get((call, id(choices)))
        if known is None:  # the choices are kept, so that no others get their id
            seconds = self._operator_seconds(op, call, rule, choices, metas)
            known = self._seconds[call, id(choices)] = (choices, seconds)
        return known[1]

    def _operator_seconds(
        self,
        op: Operator,
        call: Call,
        rule: Rule,
        choices: Sequence[Strategy],
        metas: Mapping[Ref, TensorMeta],
    ) -> FloatArray:
        splits = np.array([s.num_splits for s in choices], dtype=np.float64)
        nbytes = self._local_bytes(op, call, rule, choices, metas)
        if is_contraction(op):
            flops = operator_flops(op, metas) / splits * self._imbalance(op, choices)
            name = dtype_name(call.dtypes[0])
            seconds = matmul_s(flops, nbytes, name, self.device)
        else:
            numel = sum(m.numel for m in op.results if m is not None) / splits
            seconds = pointwise_s(numel, nbytes * POINTWISE_FUSION, self.device)
        seconds = np.asarray(seconds) + self._fill_seconds(op, call, choices, metas)
        return seconds + self._composite_seconds(op, call, choices, metas)

    def _fill_seconds(
        self,
        op: Operator,
        call: Call,
        choices: Sequence[Strategy],
        metas: Mapping[Ref, TensorMeta],
    ) -> FloatArray:
        """Padding is filled by a pointwise copy of the operand."""
        out = np.zeros(len(choices))
        for index, strategy in enumerate(choices):
            for fill in strategy.fills:
                dims, layout = call.operands[fill.operand], strategy.operands[fill.operand]
                nbytes = local_bytes(
                    metas[op.operands[fill.operand]], dims, layout, self.mesh.axis_sizes
                )
                out[index] += 2 * nbytes * POINTWISE_FUSION * self._copy_s_per_byte
                out[index] += self.device.launch_s
        return out

    def _local_bytes(
        self,
        op: Operator,
        call: Call,
        rule: Rule,
        choices: Sequence[Strategy],
        metas: Mapping[Ref, TensorMeta],
    ) -> FloatArray:
        sizes = self.mesh.axis_sizes
        whole = operator_bytes(op, metas)
        listed = sum(metas[ref].nbytes for ref in op.operands) + sum(
            m.nbytes for m in op.results if m is not None
        )
        scale = whole / listed if listed else 0.0  # operands read in part, or twice
        out = np.empty(len(choices))
        for index, strategy in enumerate(choices):
            total = 0.0
            for ref, dims, layout in zip(
                op.operands, call.operands, strategy.operands, strict=True
            ):
                total += metas[ref].nbytes * local_share(dims, layout, sizes)
            for meta, made, layout in zip(op.results, rule.results, strategy.results, strict=True):
                if meta is not None and made is not None:
                    total += meta.nbytes * local_share(made, layout, sizes)
            out[index] = total * scale
        return out

    def _imbalance(self, op: Operator, choices: Sequence[Strategy]) -> FloatArray:
        """FLOPs of the busiest device over their mean."""
        sharded = np.zeros(len(choices), dtype=bool)
        if exchanges_rows(op):
            up = _EXCHANGED[op.target][0] + 3
            sharded[:] = [0 in strategy.operands[up] for strategy in choices]
        return np.where(sharded, EXPERT_IMBALANCE, 1.0)

    def _exchange_seconds(
        self,
        op: Operator,
        call: Call,
        choices: Sequence[Strategy],
        metas: Mapping[Ref, TensorMeta],
    ) -> FloatArray:
        """Rows to their experts and back. A device sends one row per slot of its tokens, along each
        axis that exchanges; the counts before, and the routing weights beside, cost a latency."""
        x, sent, returned = _EXCHANGED[op.target]
        rows, index = metas[op.operands[x]], metas[op.operands[x + 1]]
        nbytes = rows.nbytes * index.shape[1] * EXPERT_IMBALANCE
        small = 2 * sent - 1  # counts; in backward also the weights, and their gradients
        out = np.zeros(len(choices))
        for number, strategy in enumerate(choices):
            layout = strategy.operands[x]
            local = nbytes * local_share(call.operands[x], layout, self.mesh.axis_sizes)
            for axis in strategy.axes(EXCHANGE):
                cost = self._collective(CollectiveKind.ALL_TO_ALL, axis)
                out[number] += (sent + returned) * cost.seconds(local) + small * cost.seconds(0)
        return out

    def _composite_seconds(
        self,
        op: Operator,
        call: Call,
        choices: Sequence[Strategy],
        metas: Mapping[Ref, TensorMeta],
    ) -> FloatArray:
        if exchanges_rows(op):
            return self._exchange_seconds(op, call, choices, metas)
        count = _COMPOSITE_REDUCES.get(op.target, 0)
        out = np.zeros(len(choices))
        if not count:
            return out
        meta = op.results[-1 if op.target is _CROSS_ENTROPY else 0]
        assert meta is not None
        vocabulary = op.target in (*_LOG_SOFTMAX, _CROSS_ENTROPY)
        lowering, dim = ("vp", -1) if vocabulary else ("bn", 1)
        if op.target is _CROSS_ENTROPY:
            nbytes = float(meta.nbytes)
        elif lowering == "vp":
            nbytes = meta.nbytes / max(1, meta.shape[dim])
        else:
            nbytes = meta.shape[dim] * meta.dtype.itemsize
        for index, strategy in enumerate(choices):
            local = nbytes / (strategy.num_splits if lowering == "vp" else 1)
            for axis in strategy.axes(lowering):
                cost = self._collective(CollectiveKind.ALL_REDUCE, axis)
                out[index] += count * cost.seconds(local)
        return out

    # ---- reshards

    def uneven(self, dims: Dims) -> Dims:
        """The dims where costs depend on them, none where every axis divides every atom."""
        return dims if has_uneven(dims, self.mesh.axis_sizes) else ()

    def reshard(
        self, dims: Dims, source: Layout, target: Layout, exposed: float = 1.0
    ) -> AffineCost:
        """Seconds as an affine function of the bytes of the whole tensor. dims: or `uneven` of
        them. exposed: what counts of its collectives inside a node."""
        cost = self._reshards.get((dims, source, target, exposed))
        if cost is None:
            cost = self._reshard_cost(dims, source, target, exposed)
            self._reshards[dims, source, target, exposed] = cost
        return cost

    def reshard_seconds(
        self,
        dims: Dims,
        sources: Sequence[Layout],
        targets: Sequence[Layout],
        nbytes: float,
        exposed: float = 1.0,
    ) -> FloatArray:
        """[len(sources), len(targets)] seconds for a tensor of nbytes bytes."""
        dims = self.uneven(dims)
        key = (dims, tuple(sources), tuple(targets), exposed)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self._reshard_table(dims, sources, targets, exposed)
        latency, per_byte = table
        return latency + per_byte * nbytes

    def _reshard_table(
        self, dims: Dims, sources: Sequence[Layout], targets: Sequence[Layout], exposed: float
    ) -> tuple[FloatArray, FloatArray]:
        """[len(sources), len(targets)] seconds, and seconds per byte of the whole tensor."""
        rows, row_of = _unique(sources)
        columns, column_of = _unique(targets)
        pairs = [(source, target) for source in rows for target in columns]
        costs = [self.reshard(dims, *pair, exposed) for pair in pairs]
        table = np.array([(cost.latency_s, cost.seconds_per_byte) for cost in costs], np.float64)
        latency, per_byte = table.reshape(len(rows), len(columns), 2).transpose(2, 0, 1)
        spread = np.ix_(row_of, column_of)
        return latency[spread], per_byte[spread]

    def _collective(self, kind: CollectiveKind, axis: int) -> AffineCost:
        cost = self._collectives.get((kind, axis))
        if cost is None:
            path = self.mesh.path(axis, self.cluster)
            cost = collective_coefficients(kind, path.num_ranks, path)
            self._collectives[kind, axis] = cost
        return cost

    def _reshard_cost(
        self, dims: Dims, source: Layout, target: Layout, exposed: float
    ) -> AffineCost:
        sizes = self.mesh.axis_sizes
        current = list(source)
        latency, per_byte = 0.0, 0.0
        for step in reshard_steps(source, target):
            before = local_share(dims, tuple(current), sizes)
            current[step.axis] = -2 if step.kind is StepKind.TO_PARTIAL else step.target
            after = local_share(dims, tuple(current), sizes)
            copies = 0.0  # bytes read and written by local copies, per byte of the whole tensor
            if step.kind in _COLLECTIVE:
                cost = self._collective(_COLLECTIVE[step.kind], step.axis)
                share = 1.0 if self.mesh.crosses_nodes[step.axis] else exposed
                moved = max(before, after)
                if step.kind in (StepKind.ALL_GATHER, StepKind.REDUCE_SCATTER):
                    moved = min(before, after) * sizes[step.axis]  # padding travels too
                latency += share * cost.latency_s
                per_byte += share * cost.seconds_per_byte * moved
                copies += 2 * after if step.source > 0 else 0.0  # the result is transposed
                # the operand is transposed, or padded
                padded = leaves_padding(dims, step.target, sizes[step.axis])
                copies += 2 * before if step.target > 0 or padded else 0.0
            else:
                copies += 2 * after
                latency += self.device.launch_s
            per_byte += copies * self._copy_s_per_byte
        return AffineCost(latency, per_byte)

    # ---- parameters and transfers

    def all_reduce_seconds(self, nbytes: float, axis: int) -> float:
        """Of so many bytes on each device."""
        return float(self._collective(CollectiveKind.ALL_REDUCE, axis).seconds(nbytes))

    def copy_seconds(self, nbytes: float) -> float:
        """Seconds to read and write so many bytes in all."""
        return nbytes * self._copy_s_per_byte

    def accumulate_seconds(self, nbytes: float, num_microbatches: int) -> float:
        """Per microbatch, to add its gradient of so many bytes to those before: both are read and
        the sum is written. The first one is the sum."""
        once = self.device.launch_s + self.copy_seconds(3 * nbytes)
        return once * (1 - 1 / num_microbatches)

    def optimizer_seconds(self, numel: float) -> float:
        """Seconds per step of the optimizer on the local elements."""
        return self.copy_seconds(numel * self.optimizer.moved_bytes_per_element)

    @property
    def can_offload(self) -> bool:
        """Whether the device has a host that parameters can live on."""
        return self.device.can_offload

    def host_copy_seconds(self, nbytes: float) -> float:
        """Seconds of so many bytes between device and host, in either direction. Pre:
        can_offload."""
        assert self.device.host_bandwidth_bytes_per_s is not None
        return self.device.launch_s + nbytes / self.device.host_bandwidth_bytes_per_s

    def host_optimizer_seconds(self, numel: float) -> float:
        """As `optimizer_seconds`, where it works on the host. Pre: can_offload."""
        assert self.device.host_optimizer_bytes_per_s is not None
        moved = numel * self.optimizer.moved_bytes_per_element
        return moved / self.device.host_optimizer_bytes_per_s

    def receive_seconds(self, nbytes: float) -> float:
        """Seconds to receive a local shard from another stage, which may lie on another node."""
        one_node = self.cluster.num_nodes == 1
        link = self.cluster.groups[0].intra if one_node else self.cluster.inter
        return float(collective_coefficients(CollectiveKind.SEND, 2, link).seconds(nbytes))


_CROSS_ENTROPY = torch.ops.autopar.cross_entropy.default
_LOG_SOFTMAX = (_aten._log_softmax.default, _aten._log_softmax_backward_data.default)


def _unique(layouts: Sequence[Layout]) -> tuple[list[Layout], NDArray[np.intp]]:
    """Distinct layouts, and for each given one its number."""
    numbers: dict[Layout, int] = {}
    index = [numbers.setdefault(layout, len(numbers)) for layout in layouts]
    return list(numbers), np.array(index, dtype=np.intp)


def sums_kept(sources: Sequence[Layout], targets: Sequence[Layout]) -> NDArray[np.bool_]:
    """[len(sources), len(targets)]: whether every axis that is PARTIAL in the source is so in the
    target."""
    pending = np.array(sources) == PARTIAL
    kept = np.array(targets) == PARTIAL
    both: NDArray[np.bool_] = np.all(~pending[:, None, :] | kept[None, :, :], axis=-1)
    return both


def local_bytes(meta: TensorMeta, dims: Dims, layout: Layout, sizes: tuple[int, ...]) -> float:
    """Bytes of one shard, padding included."""
    return meta.nbytes * local_share(dims, layout, sizes)


def local_numel(meta: TensorMeta, dims: Dims, layout: Layout, sizes: tuple[int, ...]) -> float:
    return math.prod(meta.shape) * local_share(dims, layout, sizes)
