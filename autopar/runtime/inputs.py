"""What the programs of one microbatch read: rows of the batch, the seed, parts of whole tensors.

A leaf of the batch belongs to the microbatches where its dim 0 is num_microbatches times the one
that was captured: microbatch m then reads rows m n to (m + 1) n - 1. A leaf of the captured shape
is read whole by each of them. Parts are views wherever strides allow it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from autopar.errors import BatchError
from autopar.graph.batch import common_rows
from autopar.graph.program import TensorMeta
from autopar.layout import (
    REPLICATE,
    Dims,
    Layout,
    atom_windows,
    dim_of_atom,
    is_uneven,
    local_atoms,
    local_shape,
)
from autopar.lowering.program import Port
from autopar.mesh import LogicalMesh
from autopar.ops.padding import pad_rows


def local_part(
    whole: Tensor, dims: Dims, layout: Layout, mesh: LogicalMesh, coords: tuple[int, ...]
) -> Tensor:
    """The shard of a whole tensor at these coordinates: a view where strides allow it, else a copy
    of the part only. Padding is zero. Pre: no pending sum in the layout."""
    sizes = mesh.axis_sizes
    lengths = local_atoms(dims, layout, sizes)
    flat = [atom for dim in dims for atom in dim]
    if list(lengths) == flat:
        return whole
    part = whole.reshape(flat)
    for atom, (start, rows) in enumerate(atom_windows(dims, layout, sizes, coords)):
        if lengths[atom] != flat[atom]:
            part = part.narrow(atom, start, rows)
        if lengths[atom] != rows:
            part = pad_rows(part, atom, lengths[atom])
    return part.reshape(local_shape(dims, layout, sizes))


def valid_part(
    local: Tensor, dims: Dims, layout: Layout, mesh: LogicalMesh, coords: tuple[int, ...]
) -> Tensor:
    """A view of a shard without its padding. Pre: the layout is plain."""
    if not is_uneven(dims, layout, mesh.axis_sizes):
        return local
    windows = atom_windows(dims, layout, mesh.axis_sizes, coords)
    for placement in layout:
        if placement >= 0:
            dim, part = dim_of_atom(dims, placement)
            inner = math.prod(dims[dim][part + 1 :])
            local = local.narrow(dim, 0, windows[placement][1] * inner)
    return local


def row_range(port: Port, mesh: LogicalMesh, coords: tuple[int, ...]) -> tuple[int, int]:
    """(start, length) of the rows of dim 0 of a microbatch that these coordinates hold."""
    if not port.meta.shape:
        return 0, 0
    atoms = port.dims[0]
    if not atoms:
        return 0, port.meta.shape[0]
    if any(port.layout[axis] in range(1, len(atoms)) for axis in range(mesh.num_axes)):
        return 0, port.meta.shape[0]  # an inner part of dim 0 is sharded: rows are scattered
    inner = math.prod(atoms[1:])
    start, rows = atom_windows(port.dims, port.layout, mesh.axis_sizes, coords)[0]
    return start * inner, rows * inner


@dataclass(frozen=True, slots=True)
class BatchFeed:
    """The batch of one step.

    leaves: by graph input name. sliced: names of those that are cut into microbatches along dim 0.
    rows: None where the leaves hold all rows of the batch; else the rows of each microbatch that
    they hold, in order, the same ones for every microbatch.
    """

    leaves: Mapping[str, Tensor]
    sliced: frozenset[str]
    num_microbatches: int
    rows: tuple[int, ...] | None = None

    def part(
        self, name: str, port: Port, mesh: LogicalMesh, coords: tuple[int, ...], microbatch: int
    ) -> Tensor:
        """What one rank reads of a leaf in one microbatch."""
        leaf = self.leaves[name]
        if name not in self.sliced:
            return local_part(leaf, port.dims, port.layout, mesh, coords)
        held = port.meta.shape[0] if self.rows is None else len(self.rows)
        part = leaf.narrow(0, microbatch * held, held)
        if self.rows is None:
            return local_part(part, port.dims, port.layout, mesh, coords)
        start, length = row_range(port, mesh, coords)
        rows = part.narrow(0, self.rows.index(start) if length else 0, length)
        dims: Dims = ((length,) if length != 1 else (), *port.dims[1:])
        layout = _without_dim_0(port.dims, port.layout, len(dims[0]))
        mine = local_part(rows, dims, layout, mesh, coords)
        padded = local_shape(port.dims, port.layout, mesh.axis_sizes)[0]
        return mine if padded == length else pad_rows(mine, 0, padded)


def whole_feed(
    leaves: Mapping[str, Tensor], metas: Mapping[str, TensorMeta], num_microbatches: int
) -> BatchFeed:
    """The feed of a whole global batch. metas: of the leaves in one microbatch. BatchError where a
    leaf has another shape or dtype than num_microbatches of them make."""
    rows = common_rows([meta.shape for meta in metas.values()])
    sliced = set()
    for name, leaf in leaves.items():
        want = metas[name]
        if want.shape and want.shape[0] == rows:
            sliced.add(name)
            want = TensorMeta((want.shape[0] * num_microbatches, *want.shape[1:]), want.dtype)
        got = TensorMeta(tuple(leaf.shape), leaf.dtype)
        if got != want:
            raise BatchError(
                f"batch input {name!r} is {got}, expected {want}: {num_microbatches} microbatches "
                f"of {metas[name]}"
            )
    return BatchFeed(leaves, frozenset(sliced), num_microbatches)


def _without_dim_0(dims: Dims, layout: Layout, left: int) -> Layout:
    """The layout of a tensor whose dim 0 is already cut and has `left` atoms."""
    gone = len(dims[0])
    return tuple(REPLICATE if 0 <= p < gone else p if p < 0 else p - gone + left for p in layout)
