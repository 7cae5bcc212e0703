"""The virtual mesh: all ranks of a logical mesh in one process, collectives included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from autopar.errors import InternalError, VerificationError
from autopar.layout import (
    PARTIAL,
    REPLICATE,
    Dims,
    Layout,
    atom_windows,
    is_uneven,
    local_atoms,
    local_shape,
    shape_of,
)
from autopar.lowering.program import CollectiveOp
from autopar.mesh import LogicalMesh
from autopar.ops.peers import part_of_place
from autopar.runtime.inputs import local_part
from autopar.runtime.interpreter import Shards

_REDUCE: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "sum": torch.sum,
    "max": torch.amax,
}


class VirtualCollectives:
    """Collectives on a list with one shard per rank of the mesh, in rank order."""

    def __init__(self, mesh: LogicalMesh) -> None:
        self._mesh = mesh

    def run(self, op: str, shards: Shards, axis: int, reduce: str) -> Shards:
        results: list[torch.Tensor | None] = [None] * len(shards)
        for group in self._mesh.groups(axis):
            members = [shards[rank] for rank in group]
            for rank, result in zip(group, _collective(op, members, reduce), strict=True):
                results[rank] = result
        return [r for r in results if r is not None]

    def copy(
        self,
        values: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        axis: int,
        scatter: bool,
        own: bool,
    ) -> None:
        """Every rank writes into the places of its group: `ops.peers`."""
        for group in self._mesh.groups(axis):
            for source, sender in enumerate(group):
                value = values[sender].reshape(-1)
                parts = value.chunk(len(group)) if scatter else [value] * len(group)
                for target, receiver in enumerate(group):
                    if own or source != target:
                        part = parts[target]
                        first = part_of_place(source, target, own=own) * part.numel()
                        places[receiver][first : first + part.numel()] = part

    def exchange(self, rows: Shards, sends: Shards, receives: Shards, axis: int) -> Shards:
        """VerificationError where a rank would get another number of rows than it expects."""
        results = list(rows)
        for group in self._mesh.groups(axis):
            runs = [_runs(rows[rank], sends[rank]) for rank in group]
            for number, rank in enumerate(group):
                parts = [run[number] for run in runs]
                expected = receives[rank].tolist()
                if [len(part) for part in parts] != expected:
                    raise VerificationError(
                        f"rank {rank} gets runs of {[len(p) for p in parts]} rows, not {expected}"
                    )
                results[rank] = torch.cat(parts)
        return results


def _runs(rows: torch.Tensor, lengths: torch.Tensor) -> Shards:
    sizes: list[int] = lengths.tolist()
    return list(rows[: sum(sizes)].split(sizes))


def _collective(op: str, members: Shards, reduce: str) -> Shards:
    n = len(members)
    if op == CollectiveOp.ALL_GATHER:
        whole = torch.cat(members)
        return [whole] * n
    if op == CollectiveOp.ALL_TO_ALL:
        chunks = [m.chunk(n) for m in members]
        return [torch.cat([row[i] for row in chunks]) for i in range(n)]
    total = _REDUCE[reduce](torch.stack(members), 0)
    if op == CollectiveOp.ALL_REDUCE:
        return [total] * n
    if op == CollectiveOp.REDUCE_SCATTER:
        return list(total.chunk(n))
    raise InternalError(f"no collective {op!r}")


def shard(
    whole: torch.Tensor,
    dims: Dims,
    layout: Layout,
    mesh: LogicalMesh,
    generator: torch.Generator | None = None,
) -> Shards:
    """One shard per rank.

    generator: without one, padding is zero, and coordinate 0 of a PARTIAL axis keeps the value, the
    others hold zeros. With one, the value is split into random summands (integers, so that the
    split is exact), and padding holds what nobody may read.
    """
    shards = []
    for rank in range(mesh.num_devices):
        coords = mesh.coordinates(rank)
        part = local_part(whole, dims, layout, mesh, coords).clone()
        if generator is not None and is_uneven(dims, layout, mesh.axis_sizes):
            part = _with_garbage(part, dims, layout, mesh, coords)
        shards.append(part)
    for axis, placement in enumerate(layout):
        if placement == PARTIAL:
            for group in mesh.groups(axis):
                _split_sum(shards, group, generator)
    for rank in range(mesh.num_devices):  # replicas hold the same summand
        pairs = zip(mesh.coordinates(rank), layout, strict=True)
        shards[rank] = shards[mesh.rank(tuple(0 if p == REPLICATE else c for c, p in pairs))]
    return shards


def _with_garbage(
    part: torch.Tensor, dims: Dims, layout: Layout, mesh: LogicalMesh, coords: tuple[int, ...]
) -> torch.Tensor:
    """The shard with its padding overwritten: NaN, True, huge integers and zeros in turns."""
    atoms = local_atoms(dims, layout, mesh.axis_sizes)
    if part.dtype.is_floating_point or part.dtype.is_complex:
        whole = torch.full(atoms, math.nan, dtype=part.dtype, device=part.device)
    else:
        whole = torch.ones(math.prod(atoms), dtype=part.dtype, device=part.device)
        if part.dtype != torch.bool:
            whole[0::2], whole[1::2] = torch.iinfo(part.dtype).max - 7, 0
        whole = whole.reshape(atoms)
    inside, values = whole, part.reshape(atoms)
    for atom, (_, rows) in enumerate(atom_windows(dims, layout, mesh.axis_sizes, coords)):
        inside, values = inside.narrow(atom, 0, rows), values.narrow(atom, 0, rows)
    inside.copy_(values)
    return whole.reshape(part.shape)


def _split_sum(shards: Shards, group: tuple[int, ...], generator: torch.Generator | None) -> None:
    """Replaces the value that every rank of the group has by summands of it."""
    for rank in group[1:]:
        value = shards[rank]
        if generator is None:
            shards[rank] = torch.zeros_like(value)
        else:
            shards[rank] = torch.randint(-4, 5, value.shape, generator=generator).to(value.dtype)
            shards[group[0]] = shards[group[0]] - shards[rank]


def unshard(shards: Shards, dims: Dims, layout: Layout, mesh: LogicalMesh) -> torch.Tensor:
    """The whole tensor from all ranks' shards, pending sums done, padding dropped.
    VerificationError where replicas differ or a shard has another shape than its layout says."""
    sizes = mesh.axis_sizes
    atoms = local_atoms(dims, layout, sizes)
    flat = [a for dim in dims for a in dim]
    whole = shards[0].new_zeros(flat)
    shape = local_shape(dims, layout, sizes)
    first: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
    for rank, local in enumerate(shards):
        if local.shape != shape:
            raise VerificationError(f"rank {rank} holds {tuple(local.shape)} instead of {shape}")
        coords = mesh.coordinates(rank)
        windows = atom_windows(dims, layout, sizes, coords)
        part, place = local.reshape(atoms), whole
        for atom, (start, rows) in enumerate(windows):
            part, place = part.narrow(atom, 0, rows), place.narrow(atom, start, rows)
        summand = tuple((c, 0) for c, p in zip(coords, layout, strict=True) if p == PARTIAL)
        twin = first.setdefault((*windows, *summand), part)
        if twin is not part:
            if not torch.allclose(twin, part, equal_nan=True):
                raise VerificationError(f"rank {rank} holds another value than its replicas")
        elif PARTIAL in layout:
            place += part
        else:
            place.copy_(part)
    return whole.reshape(shape_of(dims))
