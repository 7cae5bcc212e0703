"""Resharding: the steps that take a tensor from one layout to another on one mesh.

Order of the steps, each on one axis; axis 0 is major where two axes share an atom:

    1. PARTIAL -> shard by reduce-scatter, where the target's other shards of that atom are
       in place; otherwise PARTIAL -> REPLICATE by all-reduce
    2. shard -> shard of another atom by all-to-all, where no other axis touches either atom
    3. all-gathers, minor axis first; also of an unchanged minor shard whose major axis changes
    4. slices of what is replicated, major axis first (no communication)
    5. REPLICATE -> PARTIAL: coordinate 0 keeps the value, the others hold zeros

The planner prices exactly this list and the lowering emits exactly this list.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from autopar.layout import PARTIAL, REPLICATE, Layout


class StepKind(StrEnum):
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    ALL_GATHER = "all_gather"
    SLICE = "slice"
    TO_PARTIAL = "to_partial"


class Step(NamedTuple):
    """One step on one axis. source and target: atoms that the axis shards before and after (-1
    none)."""

    kind: StepKind
    axis: int
    source: int = REPLICATE
    target: int = REPLICATE


@lru_cache(maxsize=262144)
def reshard_steps(source: Layout, target: Layout) -> tuple[Step, ...]:
    """The steps from one layout to another. O(axes^2)."""
    if source == target:
        return ()
    current = list(source)
    axes = range(len(source))
    steps: list[Step] = []
    for axis in axes:  # 1
        if current[axis] == PARTIAL and target[axis] != PARTIAL:
            atom = target[axis]
            if atom >= 0 and _major_in_place(current, target, axis, atom):
                steps.append(Step(StepKind.REDUCE_SCATTER, axis, target=atom))
                current[axis] = atom
            else:
                steps.append(Step(StepKind.ALL_REDUCE, axis))
                current[axis] = REPLICATE
    for axis in axes:  # 2
        j, k = current[axis], target[axis]
        if j >= 0 and k >= 0 and j != k and not _touched(current, target, axis, (j, k)):
            steps.append(Step(StepKind.ALL_TO_ALL, axis, j, k))
            current[axis] = k
    moving = [
        current[a] >= 0 and (current[a] != target[a] or _major_moves(current, target, a))
        for a in axes
    ]
    for axis in reversed(axes):  # 3
        if moving[axis]:
            steps.append(Step(StepKind.ALL_GATHER, axis, source=current[axis]))
            current[axis] = REPLICATE
    for axis in axes:  # 4
        if current[axis] == REPLICATE and target[axis] >= 0:
            steps.append(Step(StepKind.SLICE, axis, target=target[axis]))
            current[axis] = target[axis]
    for axis in axes:  # 5
        if current[axis] == REPLICATE and target[axis] == PARTIAL:
            steps.append(Step(StepKind.TO_PARTIAL, axis))
            current[axis] = PARTIAL
    return tuple(steps)


def _major_in_place(current: list[int], target: Layout, axis: int, atom: int) -> bool:
    """More major axes are on the atom now exactly where they shall be, and no minor axis is."""
    major = all((current[b] == atom) == (target[b] == atom) for b in range(axis))
    return major and all(current[b] != atom for b in range(axis + 1, len(current)))


def _touched(current: list[int], target: Layout, axis: int, atoms: tuple[int, int]) -> bool:
    return any(current[b] in atoms or target[b] in atoms for b in range(len(current)) if b != axis)


def _major_moves(current: list[int], target: Layout, axis: int) -> bool:
    atom = current[axis]
    return any((current[b] == atom) != (target[b] == atom) for b in range(axis))
