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
    Atoms,
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
        operands=_columns([None if f is None else f.operands for f in factors], num_operands),
        results=_columns([None if f is None else f.results for f in factors], len(rule.results)),
        num_splits=splits,
        fills=tuple(fills),
    )


def _columns(axes: Sequence[Layout | None], num_tensors: int) -> tuple[Layout, ...]:
    """What each axis does to each tensor, by tensor."""
    if not axes:
        return ((),) * num_tensors
    replicated = (REPLICATE,) * num_tensors
    return tuple(zip(*[replicated if axis is None else axis for axis in axes], strict=True))


def _is_uneven(factor: Factor, size: int) -> bool:
    return factor.size % size != 0  # a size of 0 takes any number


@lru_cache(maxsize=16384)
def strategies(rule: Rule, operands: tuple[Dims, ...], mesh: MeshSizes) -> tuple[Strategy, ...]:
    """Every valid strategy, the all-replicated one first. O(factors^axes)."""
    choices: list[list[Factor | None]] = []
    for size in mesh:
        fits = [f for f in rule.factors if f.size == 0 or _fits(f, (size,))]
        choices.append([None, *(fits if size > 1 else [])])
    atoms = [flat_atoms(dims) for dims in operands]
    made = [None if dims is None else flat_atoms(dims) for dims in rule.results]
    found = []
    for factors in itertools.product(*choices):
        if not _factors_fit(factors, mesh):
            continue
        strategy = make_strategy(rule, factors, len(operands), mesh)
        tensors = itertools.chain(
            zip(atoms, strategy.operands, strict=True), zip(made, strategy.results, strict=True)
        )
        if all(a is None or _atoms_agree(a, layout, factors, mesh) for a, layout in tensors):
            found.append(strategy)
    return tuple(found)


def _fits(factor: Factor, axes: Sequence[int]) -> bool:
    """Whether these axes can share the index."""
    even = factor.size % math.prod(axes) == 0
    return can_shard(factor.size, axes) and (even or factor.fill is not None)


def _factors_fit(factors: Sequence[Factor | None], mesh: MeshSizes) -> bool:
    """Whether each factor can be shared by its axes."""
    axes: dict[str, list[int]] = {}
    for size, factor in zip(mesh, factors, strict=True):
        if factor is not None and factor.size:
            axes.setdefault(factor.name, []).append(size)
            if not _fits(factor, axes[factor.name]):
                return False
    return True


def _atoms_agree(
    atoms: Atoms, layout: Layout, factors: Sequence[Factor | None], mesh: MeshSizes
) -> bool:
    """Each atom is named by one factor only, or by two that may share it, and can be shared;
    unevenly only as the factor is."""
    owner: dict[int, str] = {}
    axes: dict[int, list[int]] = {}
    for placement, factor, size in zip(layout, factors, mesh, strict=True):
        if placement < 0 or factor is None:
            continue
        name = factor.shares or factor.name
        if owner.setdefault(placement, name) != name:
            return False
        if atoms[placement] != factor.size and _is_uneven(factor, size):
            return False
        axes.setdefault(placement, []).append(size)
    return all(can_shard(atoms[atom], sizes) for atom, sizes in axes.items())


@lru_cache(maxsize=16384)
def layouts(dims: Dims, mesh: MeshSizes, *, partial: bool = False) -> tuple[Layout, ...]:
    """Every layout that a tensor can have on a mesh, the replicated one first."""
    atoms = flat_atoms(dims)
    per_axis = []
    for size in mesh:
        fits = [a for a, n in enumerate(atoms) if n and can_shard(n, (size,))] if size > 1 else []
        per_axis.append([REPLICATE, *([PARTIAL] if partial and size > 1 else []), *fits])
    return tuple(x for x in itertools.product(*per_axis) if is_valid(dims, x, mesh))
