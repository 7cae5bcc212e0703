"""Layouts: how one tensor lies on a logical mesh.

A tensor dim is a product of **atoms**: ``view`` regroups atoms instead of hiding them, so that the
batch part of a flattened ``[batch * sequence, hidden]`` stays shardable. ``Dims`` holds the atoms
of each dim, major first; a dim of size 1 has none. A layout gives one placement per mesh axis: the
number of an atom (counted over all dims) that the axis shards, REPLICATE, or PARTIAL (a sum is
pending). Where two axes shard one atom, axis 0 is the major one. On a dim's first atom this is
DTensor's ``Shard(dim)``; :func:`to_placements` makes the translation.
"""

from __future__ import annotations

import math
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


def is_valid(dims: Dims, layout: Layout, mesh: MeshSizes) -> bool:
    """Every sharded atom exists and is divided evenly by the axes on it."""
    atoms = flat_atoms(dims)
    shards: dict[int, int] = {}
    for placement, size in zip(layout, mesh, strict=True):
        if placement >= 0:
            shards[placement] = shards.get(placement, 1) * size
    return all(a < len(atoms) and atoms[a] % n == 0 for a, n in shards.items())


@lru_cache(maxsize=65536)
def local_atoms(dims: Dims, layout: Layout, mesh: MeshSizes) -> Atoms:
    """Atom sizes of one shard. Shards are even, so all ranks have the same."""
    atoms = list(flat_atoms(dims))
    for placement, size in zip(layout, mesh, strict=True):
        if placement >= 0:
            if atoms[placement] % size:
                raise LayoutError(
                    f"atom {placement} of {dims} has {atoms[placement]} rows, which {size} devices"
                    " do not divide; choose another placement"
                )
            atoms[placement] //= size
    return tuple(atoms)


@lru_cache(maxsize=65536)
def local_shape(dims: Dims, layout: Layout, mesh: MeshSizes) -> tuple[int, ...]:
    """Shape of one shard."""
    atoms = iter(local_atoms(dims, layout, mesh))
    return tuple(math.prod(next(atoms) for _ in dim) for dim in dims)


def num_shards(layout: Layout, mesh: MeshSizes) -> int:
    """How many different shards there are: local bytes = bytes / num_shards."""
    return math.prod(size for placement, size in zip(layout, mesh, strict=True) if placement >= 0)


def atom_offsets(dims: Dims, layout: Layout, mesh: MeshSizes) -> tuple[Offset, ...]:
    """Global start of a shard in each atom. Chunk length of an axis = atom / (its own and all more
    major axes on that atom)."""
    strides = [[0] * len(mesh) for _ in flat_atoms(dims)]
    chunk = list(flat_atoms(dims))
    for axis, (placement, size) in enumerate(zip(layout, mesh, strict=True)):
        if placement >= 0:
            chunk[placement] //= size
            strides[placement][axis] = chunk[placement]
    return tuple(Offset(tuple(row)) for row in strides)


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


def to_placements(dims: Dims, layout: Layout) -> tuple[Placement, ...]:
    """DTensor placements. LayoutError where an inner atom is sharded, which DTensor cannot say."""
    placements: list[Placement] = []
    for placement in layout:
        if placement == REPLICATE:
            placements.append(Replicate())
        elif placement == PARTIAL:
            placements.append(Partial())
        else:
            dim, part = dim_of_atom(dims, placement)
            if part:
                raise LayoutError(f"DTensor cannot shard atom {part} inside dim {dim} of {dims}")
            placements.append(Shard(dim))
    return tuple(placements)


def is_plain(dims: Dims, layout: Layout) -> bool:
    """Only first atoms of dims are sharded: DTensor can say it, and so can any other split of the
    dims."""
    return all(p < 0 or dim_of_atom(dims, p)[1] == 0 for p in layout)


def coarsen(dims: Dims, layout: Layout) -> tuple[Dims, Layout]:
    """The same plain layout of the same tensor with one atom per dim. LayoutError if it is not
    plain."""
    if not is_plain(dims, layout):
        raise LayoutError(f"{layout_text(dims, layout)} of {dims} shards inside a dim")
    raw = raw_dims(shape_of(dims))
    moved = tuple(p if p < 0 else sum(map(len, raw[: dim_of_atom(dims, p)[0]])) for p in layout)
    return raw, moved
