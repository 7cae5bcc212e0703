"""Strategies: the ways in which a logical mesh can run one operator.

A strategy gives each mesh axis to one factor of the operator's rule, or to none. It is valid where
every atom is named by one factor only (or by two that may share it) and is divided by the axes on
it, and no factor gets more shards than its size allows. A factor may be shared unevenly where it
says what its padding must hold and all of its atoms have its size. Layouts of operands and results
follow from the factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.layout import (
    PARTIAL,
    REPLICATE,
    Dims,
    Layout,
    MeshSizes,
    can_shard,
    chunk_rows,
    flat_atoms,
    is_valid,
)
from autopar.sharding.rule import Factor, Rule

NO_FACTOR = "-"


class Fill(NamedTuple):
    """The padding that an axis leaves in an operand must hold a value before the call."""

    operand: int
    axis: int
    value: float


@dataclass(frozen=True, slots=True)
class Strategy:
    """factors[axis]: the factor that the axis is given to, or None. num_splits: what the work is
    divided by: the number of devices that share it, less with padding."""

    factors: tuple[Factor | None, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    num_splits: float
    fills: tuple[Fill, ...] = ()

    @property
    def text(self) -> str:
        """ "b k": the factor's name per axis, "-" for none."""
        return " ".join(NO_FACTOR if f is None else f.name for f in self.factors)

    def axes(self, lowering: str) -> tuple[int, ...]:
        """The axes whose factor has this composite lowering."""
        return tuple(
            axis for axis, f in enumerate(self.factors) if f is not None and f.lowering == lowering
        )


def make_strategy(
    rule: Rule, factors: Sequence[Factor | None], num_operands: int, mesh: MeshSizes
) -> Strategy:
    """Layouts that follow from an assignment of axes to factors."""

    def column(pick: str, index: int) -> Layout:
        return tuple(REPLICATE if f is None else getattr(f, pick)[index] for f in factors)

    splits = 1.0
    fills: list[Fill] = []
    for axis, (size, factor) in enumerate(zip(mesh, factors, strict=True)):
        if factor is None or not factor.splits:
            continue
        uneven = _is_uneven(factor, size)
        splits *= factor.size / chunk_rows(factor.size, size) if uneven else size
        if uneven and factor.fill is not None:
            fills += [Fill(i, axis, v) for i, v in enumerate(factor.fill) if v is not None]
    return Strategy(
        factors=tuple(factors),
        operands=tuple(column("operands", i) for i in range(num_operands)),
        results=tuple(column("results", i) for i in range(len(rule.results))),
        num_splits=splits,
        fills=tuple(fills),
    )


def _is_uneven(factor: Factor, size: int) -> bool:
    return factor.size % size != 0  # a size of 0 takes any number


@lru_cache(maxsize=16384)
def strategies(rule: Rule, operands: tuple[Dims, ...], mesh: MeshSizes) -> tuple[Strategy, ...]:
    """Every valid strategy, the all-replicated one first. O(factors^axes)."""
    choices: list[list[Factor | None]] = []
    for size in mesh:
        fits = [f for f in rule.factors if f.size == 0 or _fits(f, (size,))]
        choices.append([None, *(fits if size > 1 else [])])
    found = []
    for factors in itertools.product(*choices):
        strategy = make_strategy(rule, factors, len(operands), mesh)
        if _is_valid(rule, strategy, operands, mesh):
            found.append(strategy)
    return tuple(found)


def _fits(factor: Factor, axes: Sequence[int]) -> bool:
    """Whether these axes can share the index."""
    even = factor.size % math.prod(axes) == 0
    return can_shard(factor.size, axes) and (even or factor.fill is not None)


def _is_valid(rule: Rule, strategy: Strategy, operands: tuple[Dims, ...], mesh: MeshSizes) -> bool:
    axes: dict[str, list[int]] = {}
    for size, factor in zip(mesh, strategy.factors, strict=True):
        if factor is not None and factor.size:
            axes.setdefault(factor.name, []).append(size)
            if not _fits(factor, axes[factor.name]):
                return False
    tensors = [*zip(operands, strategy.operands, strict=True)]
    for result, layout in zip(rule.results, strategy.results, strict=True):
        if result is not None:
            tensors.append((result, layout))
    return all(_atoms_agree(dims, layout, strategy.factors, mesh) for dims, layout in tensors)


def _atoms_agree(
    dims: Dims, layout: Layout, factors: Sequence[Factor | None], mesh: MeshSizes
) -> bool:
    """Each atom is named by one factor only, or by two that may share it, and can be shared;
    unevenly only as the factor is."""
    owner: dict[int, str] = {}
    atoms = flat_atoms(dims)
    for placement, factor, size in zip(layout, factors, mesh, strict=True):
        if placement < 0 or factor is None:
            continue
        name = factor.shares or factor.name
        if owner.setdefault(placement, name) != name:
            return False
        if atoms[placement] != factor.size and _is_uneven(factor, size):
            return False
    return is_valid(dims, layout, mesh)


@lru_cache(maxsize=16384)
def layouts(dims: Dims, mesh: MeshSizes, *, partial: bool = False) -> tuple[Layout, ...]:
    """Every layout that a tensor can have on a mesh, the replicated one first."""
    atoms = flat_atoms(dims)
    per_axis = []
    for size in mesh:
        fits = [a for a, n in enumerate(atoms) if n and can_shard(n, (size,))] if size > 1 else []
        per_axis.append([REPLICATE, *([PARTIAL] if partial and size > 1 else []), *fits])
    return tuple(x for x in itertools.product(*per_axis) if is_valid(dims, x, mesh))
