"""Layouts: how one tensor lies on a logical mesh.

A tensor dim is a product of **atoms**: ``view`` regroups atoms instead of hiding them, so that the
batch part of a flattened ``[batch * sequence, hidden]`` stays shardable. ``Dims`` holds the atoms
of each dim, major first; a dim of size 1 has none. A layout gives one placement per mesh axis: the
number of an atom (counted over all dims) that the axis shards, REPLICATE, or PARTIAL (a sum is
pending). Where two axes shard one atom, axis 0 is the major one. On a dim's first atom this is
DTensor's ``Shard(dim)``; :func:`to_placements` makes the translation.

Where n devices do not divide an atom of a rows, a shard is ceil(a / n) rows long and starts at its
coordinate times that, as in DTensor; the last shards run past the end or begin there. Every local
tensor has the full length, so that all ranks share one program: what lies beyond the end is
**padding**, whose content means nothing. An uneven atom has one axis on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from autopar.errors import LayoutError

REPLICATE = -1
PARTIAL = -2

Atoms = tuple[int, ...]
Dims = tuple[Atoms, ...]
Layout = tuple[int, ...]
MeshSizes = tuple[int, ...]

# The least part of the padded rows that must be rows of the tensor: 5 rows on 4 devices are 5 of 8.
_LEAST_FILLED = 5 / 8


@dataclass(frozen=True, slots=True)
class Offset:
    """constant + sum of strides[axis] * coordinate[axis]: an integer that differs between ranks.

    Stands in the arguments of a lowered operator, so that all ranks share one program text.
    """

    strides: tuple[int, ...]
    constant: int = 0

    def at(self, coords: tuple[int, ...]) -> int:
        return self.constant + sum(s * c for s, c in zip(self.strides, coords, strict=True))


def raw_dims(shape: tuple[int, ...]) -> Dims:
    """Dims of a tensor about whose structure nothing is known: one atom per dim larger than 1."""
    return tuple((size,) if size != 1 else () for size in shape)


@lru_cache(maxsize=16384)
def flat_atoms(dims: Dims) -> Atoms:
    return tuple(atom for dim in dims for atom in dim)


def shape_of(dims: Dims) -> tuple[int, ...]:
    return tuple(math.prod(dim) for dim in dims)


def dim_of_atom(dims: Dims, atom: int) -> tuple[int, int]:
    """(dim, position inside the dim) of an atom."""
    for dim, atoms in enumerate(dims):
        if atom < len(atoms):
            return dim, atom
        atom -= len(atoms)
    raise LayoutError(f"no such atom in {dims}")


def first_atom(dims: Dims, dim: int) -> int | None:
    """Number of the first atom of a dim; None for a dim of size 1."""
    return sum(map(len, dims[:dim])) if dims[dim] else None


def chunk_rows(rows: int, shards: int) -> int:
    """Length of a shard, padding included."""
    return -(-rows // shards)


def can_shard(rows: int, axes: Sequence[int]) -> bool:
    """Whether mesh axes of these sizes may shard an atom together: they divide it, or one does so
    unevenly without too much padding."""
    shards = math.prod(axes)
    if rows % shards == 0:
        return True
    padded = chunk_rows(rows, shards) * shards
    return sum(size > 1 for size in axes) == 1 and rows >= max(shards, _LEAST_FILLED * padded)


def axes_of_atoms(layout: Layout, mesh: MeshSizes) -> dict[int, list[int]]:
    """Sharded atom -> sizes of the axes on it, the major one first."""
    axes: dict[int, list[int]] = {}
    for placement, size in zip(layout, mesh, strict=True):
        if placement >= 0:
            axes.setdefault(placement, []).append(size)
    return axes


@lru_cache(maxsize=65536)
def is_valid(dims: Dims, layout: Layout, mesh: MeshSizes) -> bool:
    """Every sharded atom exists and can be shared by the axes on it."""
    atoms = flat_atoms(dims)
    return all(
        atom < len(atoms) and can_shard(atoms[atom], axes)
        for atom, axes in axes_of_atoms(layout, mesh).items()
    )


@lru_cache(maxsize=4096)
def has_uneven(dims: Dims, mesh: MeshSizes) -> bool:
    """Whether some axis can shard some atom unevenly."""
    return any(a % n and can_shard(a, (n,)) for a in flat_atoms(dims) for n in mesh)


@lru_cache(maxsize=65536)
def is_uneven(dims: Dims, layout: Layout, mesh: MeshSizes) -> bool:
    """Whether some shard has padding."""
    atoms = flat_atoms(dims)
    return any(p >= 0 and atoms[p] % n for p, n in zip(layout, mesh, strict=True))


def leaves_padding(dims: Dims, atom: int, size: int) -> bool:
    """Whether an axis of this size shards the atom unevenly. No dims, no atom: it does not."""
    return bool(dims) and atom >= 0 and flat_atoms(dims)[atom] % size != 0


@lru_cache(maxsize=65536)
def local_atoms(dims: Dims, layout: Layout, mesh: MeshSizes) -> Atoms:
    """Atom sizes of one shard, padding included: the same on all ranks."""
    atoms = list(flat_atoms(dims))
    for atom, axes in axes_of_atoms(layout, mesh).items():
        if not can_shard(atoms[atom], axes):
            raise LayoutError(
                f"atom {atom} of {dims} has {atoms[atom]} rows, which {math.prod(axes)} devices"
                " cannot share; choose another placement"
            )
        atoms[atom] = chunk_rows(atoms[atom], math.prod(axes))
    return tuple(atoms)


@lru_cache(maxsize=65536)
def local_shape(dims: Dims, layout: Layout, mesh: MeshSizes) -> tuple[int, ...]:
    """Shape of one shard."""
    atoms = iter(local_atoms(dims, layout, mesh))
    return tuple(math.prod(next(atoms) for _ in dim) for dim in dims)


@lru_cache(maxsize=65536)
def local_share(dims: Dims, layout: Layout, mesh: MeshSizes) -> float:
    """Part of a tensor that a shard is, padding included: local bytes / bytes of the tensor. No
    dims: of any tensor that is divided evenly."""
    share = 1.0
    atoms = flat_atoms(dims)
    for atom, axes in axes_of_atoms(layout, mesh).items():
        shards = math.prod(axes)
        uneven = bool(dims) and atoms[atom] % shards
        share *= chunk_rows(atoms[atom], shards) / atoms[atom] if uneven else 1 / shards
    return share


def atom_offsets(dims: Dims, layout: Layout, mesh: MeshSizes) -> tuple[Offset, ...]:
    """Global start of a shard in each atom; of a shard without rows, the end or beyond. Chunk
    length of an axis = atom / (its own and all more major axes on that atom)."""
    strides = [[0] * len(mesh) for _ in flat_atoms(dims)]
    chunk = list(flat_atoms(dims))
    for axis, (placement, size) in enumerate(zip(layout, mesh, strict=True)):
        if placement >= 0:
            chunk[placement] = chunk_rows(chunk[placement], size)
            strides[placement][axis] = chunk[placement]
    return tuple(Offset(tuple(row)) for row in strides)


def atom_windows(
    dims: Dims, layout: Layout, mesh: MeshSizes, coords: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(global start, rows) of a shard in each atom, without its padding."""
    lengths = local_atoms(dims, layout, mesh)
    windows = []
    for atom, length, offset in zip(
        flat_atoms(dims), lengths, atom_offsets(dims, layout, mesh), strict=True
    ):
        start = min(offset.at(coords), atom)
        windows.append((start, min(length, atom - start)))
    return tuple(windows)


def replicated(num_axes: int) -> Layout:
    return (REPLICATE,) * num_axes


def without_partial(layout: Layout) -> Layout:
    """The same with every pending sum done."""
    return tuple(REPLICATE if p == PARTIAL else p for p in layout)


def layout_text(dims: Dims, layout: Layout) -> str:
    """ "S0 R P": one word per axis. "S0.1" is the second atom of dim 0."""
    words = []
    for placement in layout:
        if placement == REPLICATE:
            words.append("R")
        elif placement == PARTIAL:
            words.append("P")
        else:
            dim, part = dim_of_atom(dims, placement)
            words.append(f"S{dim}.{part}" if part else f"S{dim}")
    return " ".join(words)


def parse_layout(text: str, dims: Dims) -> Layout:
    """Inverse of `layout_text`. LayoutError on a dim or atom that the tensor does not have."""
    layout: list[int] = []
    for word in text.split():
        if word in ("R", "P"):
            layout.append(REPLICATE if word == "R" else PARTIAL)
            continue
        dim_text, _, part_text = word.removeprefix("S").partition(".")
        part = int(part_text) if part_text.isdigit() else 0
        if not word.startswith("S") or not dim_text.isdigit() or (part_text and not part):
            raise LayoutError(f"a placement reads R, P, S<dim> or S<dim>.<atom>: got {word!r}")
        dim = int(dim_text)
        if dim >= len(dims) or part >= len(dims[dim]):
            raise LayoutError(
                f"{word!r} of a tensor with dims {dims}: there is no such part to shard"
            )
        layout.append(sum(map(len, dims[:dim])) + part)
    return tuple(layout)


def to_placements(dims: Dims, layout: Layout, mesh: MeshSizes) -> tuple[Placement, ...]:
    """DTensor placements. LayoutError where DTensor cannot say it: see `is_plain`."""
    if not is_plain(dims, layout, mesh):
        raise LayoutError(f"DTensor cannot say {layout_text(dims, layout)} of {dims} on {mesh}")
    placements: list[Placement] = []
    for placement in layout:
        if placement == REPLICATE:
            placements.append(Replicate())
        elif placement == PARTIAL:
            placements.append(Partial())
        else:
            placements.append(Shard(dim_of_atom(dims, placement)[0]))
    return tuple(placements)


def is_plain(dims: Dims, layout: Layout, mesh: MeshSizes) -> bool:
    """Only first atoms of dims are sharded, and unevenly only the one atom of a dim: DTensor can
    say it, and so can any other split of the dims."""
    for placement, size in zip(layout, mesh, strict=True):
        if placement >= 0:
            dim, part = dim_of_atom(dims, placement)
            if part or (dims[dim][0] % size and len(dims[dim]) > 1):
                return False
    return True


def coarsen(dims: Dims, layout: Layout, mesh: MeshSizes) -> tuple[Dims, Layout]:
    """The same plain layout of the same tensor with one atom per dim. LayoutError if it is not
    plain."""
    if not is_plain(dims, layout, mesh):
        raise LayoutError(f"{layout_text(dims, layout)} of {dims} shards inside a dim")
    raw = raw_dims(shape_of(dims))
    moved = tuple(p if p < 0 else sum(map(len, raw[: dim_of_atom(dims, p)[0]])) for p in layout)
    return raw, moved
