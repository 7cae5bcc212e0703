"""The batch as one rank sees it: which rows it needs, and the checks on what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.errors import BatchError
from autopar.graph.batch import common_rows
from autopar.graph.program import Graph, InputKind, TensorMeta
from autopar.lowering.lower import LoweredStage
from autopar.runtime.inputs import BatchFeed, row_range


@dataclass(frozen=True, slots=True, eq=False)
class DataShard:
    """The rows of a global batch that one rank reads.

    per_microbatch: rows of each microbatch, in order; num_rows: of a microbatch. A batch that was
    reduced with `select` can be given to `train_step` in place of the whole one, so that a loader
    need not make other rows.
    """

    graph: Graph
    sliced: frozenset[str]
    num_microbatches: int
    num_rows: int
    per_microbatch: tuple[int, ...]

    @property
    def rows(self) -> Tensor:
        """int64: row numbers in the global batch, in the order in which `select` keeps them."""
        starts = torch.arange(self.num_microbatches).unsqueeze(1) * self.num_rows
        return (starts + torch.tensor(self.per_microbatch, dtype=torch.int64)).reshape(-1)

    def select(self, batch: Any) -> Any:
        """The batch with these rows only, of each leaf that has rows."""
        leaves = self.graph.batch_spec.tensors(batch)
        inputs = self.graph.inputs_of(InputKind.BATCH)
        rows = self.rows
        kept = tuple(
            leaf.index_select(0, rows.to(leaf.device)) if inp.name in self.sliced else leaf
            for inp, leaf in zip(inputs, leaves, strict=True)
        )
        return self.graph.batch_spec.rebuild(kept)

    def feed(self, batch: Any) -> BatchFeed:
        """Of the whole global batch or of these rows. BatchError says what was expected and got."""
        leaves = self.graph.batch_spec.tensors(batch)
        inputs = self.graph.inputs_of(InputKind.BATCH)
        named = {i.name: leaf for i, leaf in zip(inputs, leaves, strict=True)}
        without = [i.target for i in inputs if named[i.name].is_meta]
        if without:
            raise BatchError(
                f"batch[{without[0]!r}] is on meta and has no data: a meta batch serves to plan;"
                " pass one on the CPU or the GPU to train."
            )
        wholes = {i.name: self._meta(i.name, i.meta, self.num_rows) for i in inputs}
        parts = {i.name: self._meta(i.name, i.meta, len(self.per_microbatch)) for i in inputs}
        if all(_fits(named[name], meta) for name, meta in wholes.items()):
            return BatchFeed(named, self.sliced, self.num_microbatches)
        if all(_fits(named[name], meta) for name, meta in parts.items()):
            return BatchFeed(named, self.sliced, self.num_microbatches, self.per_microbatch)
        paths = {i.name: i.target for i in inputs}
        wrong = next(name for name, meta in wholes.items() if not _fits(named[name], meta))
        got = TensorMeta(tuple(named[wrong].shape), named[wrong].dtype)
        raise BatchError(
            f"batch[{paths[wrong]!r}] is {got}, expected {wholes[wrong]} (a whole batch, "
            f"{self.num_microbatches} microbatches of {self.num_rows} rows) or {parts[wrong]} (the "
            "rows that data_shard selects for this rank)"
        )

    def _meta(self, name: str, meta: TensorMeta, rows: int) -> TensorMeta:
        if name not in self.sliced:
            return meta
        return TensorMeta((rows * self.num_microbatches, *meta.shape[1:]), meta.dtype)


def _fits(leaf: Tensor, meta: TensorMeta) -> bool:
    return tuple(leaf.shape) == meta.shape and leaf.dtype == meta.dtype


def sliced_leaves(graph: Graph) -> frozenset[str]:
    """The batch inputs that are cut into microbatches: those with the batch's rows."""
    inputs = graph.inputs_of(InputKind.BATCH)
    rows = common_rows([i.meta.shape for i in inputs])
    return frozenset(i.name for i in inputs if i.meta.shape and i.meta.shape[0] == rows)


def data_shard(
    graph: Graph, stages: Sequence[LoweredStage], rank: int, num_microbatches: int
) -> DataShard:
    """Which rows a rank of a worker needs: the union over the leaves that its programs read. rank:
    in the meshes of the worker's stages."""
    sliced = sliced_leaves(graph)
    rows: set[int] = set()
    for stage in stages:
        coords = stage.mesh.coordinates(rank)
        for program in stage.microbatch_programs:
            for name, port in program.inputs.items():
                if name in sliced:
                    start, length = row_range(port, stage.mesh, coords)
                    rows.update(range(start, start + length))
    num_rows = next((i.meta.shape[0] for i in graph.inputs if i.name in sliced), 0)
    return DataShard(graph, sliced, num_microbatches, num_rows, tuple(sorted(rows)))
