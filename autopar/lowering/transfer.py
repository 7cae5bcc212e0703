"""Transfers: how a value goes from one stage's mesh and layout to another stage's.

Both sides see the value as the same atoms. A rank's shard is a box of atoms; a receiving rank gets,
from one replica of every sending box that meets its own, the part in common. Each tile travels once
to each rank that asked for it; a receiving layout that shards, followed by a gather on the fast
link, is a choice of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.errors import InternalError
from autopar.graph.program import Phase, TensorMeta
from autopar.layout import PARTIAL, Dims, Layout, atom_windows
from autopar.mesh import LogicalMesh

Box = tuple[tuple[int, int], ...]  # (start, stop) per atom


@dataclass(frozen=True, slots=True)
class Tile:
    """Part of a value that one rank sends to another; ranks count inside their stages' meshes.

    source_window and target_window: (start, length) per atom inside the local shards.
    """

    source: int
    target: int
    source_window: tuple[tuple[int, int], ...]
    target_window: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One value between two stages, each microbatch (phase) or once per step (phase None).

    key: name of the value: the SENT output there, the RECEIVED input here; for once-per-step
    transfers the parameter's input names on both sides are in source_key and target_key.
    """

    source_key: str
    target_key: str
    source_stage: int
    target_stage: int
    phase: Phase | None
    meta: TensorMeta
    dims: Dims
    source_layout: Layout
    target_layout: Layout
    tiles: tuple[Tile, ...]


def _box(dims: Dims, layout: Layout, mesh: LogicalMesh, rank: int) -> Box:
    """Without padding, which nobody sends."""
    windows = atom_windows(dims, layout, mesh.axis_sizes, mesh.coordinates(rank))
    return tuple((start, start + rows) for start, rows in windows)


def make_tiles(
    dims: Dims,
    source_layout: Layout,
    source_mesh: LogicalMesh,
    target_layout: Layout,
    target_mesh: LogicalMesh,
) -> tuple[Tile, ...]:
    """Tiles that fill every receiving shard. Replicas of a sending box take turns.
    O(ranks^2 atoms)."""
    if PARTIAL in source_layout or PARTIAL in target_layout:
        raise InternalError("a value with a pending sum cannot be transferred")
    replicas: dict[Box, list[int]] = {}
    for rank in range(source_mesh.num_devices):
        replicas.setdefault(_box(dims, source_layout, source_mesh, rank), []).append(rank)
    tiles = []
    for target in range(target_mesh.num_devices):
        want = _box(dims, target_layout, target_mesh, target)
        for box, ranks in replicas.items():
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, want, strict=True))
            if any(start >= stop for start, stop in common):
                continue
            tiles.append(
                Tile(
                    source=ranks[target % len(ranks)],
                    target=target,
                    source_window=_window(common, box),
                    target_window=_window(common, want),
                )
            )
    return tuple(tiles)


def _window(part: Box, whole: Box) -> tuple[tuple[int, int], ...]:
    return tuple((a - c, b - a) for (a, b), (c, _) in zip(part, whole, strict=True))
