"""Strategies: the ways in which a logical mesh can run one operator.

A strategy gives each mesh axis to one factor of the operator's rule, or to none. It is valid where
every atom is named by one factor only (or by two that may share it) and is divided by the axes on
it, and no factor gets more shards than its size allows. Layouts of operands and results follow from
the factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.layout import PARTIAL, REPLICATE, Dims, Layout, MeshSizes, flat_atoms
from autopar.sharding.rule import Factor, Rule

NO_FACTOR = "-"


@dataclass(frozen=True, slots=True)
class Strategy:
    """factors[axis]: the factor that the axis is given to, or None."""

    factors: tuple[Factor | None, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    num_splits: int  # devices among which the work is divided

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

    splits = math.prod(n for n, f in zip(mesh, factors, strict=True) if f is not None and f.splits)
    return Strategy(
        factors=tuple(factors),
        operands=tuple(column("operands", i) for i in range(num_operands)),
        results=tuple(column("results", i) for i in range(len(rule.results))),
        num_splits=splits,
    )


@lru_cache(maxsize=16384)
def strategies(rule: Rule, operands: tuple[Dims, ...], mesh: MeshSizes) -> tuple[Strategy, ...]:
    """Every valid strategy, the all-replicated one first. O(factors^axes)."""
    choices: list[list[Factor | None]] = []
    for size in mesh:
        fits = [f for f in rule.factors if f.size == 0 or f.size % size == 0]
        choices.append([None, *(fits if size > 1 else [])])
    found = []
    for factors in itertools.product(*choices):
        strategy = make_strategy(rule, factors, len(operands), mesh)
        if _is_valid(rule, strategy, operands, mesh):
            found.append(strategy)
    return tuple(found)


def _is_valid(rule: Rule, strategy: Strategy, operands: tuple[Dims, ...], mesh: MeshSizes) -> bool:
    shards: dict[str, int] = {}
    for size, factor in zip(mesh, strategy.factors, strict=True):
        if factor is not None and factor.size:
            shards[factor.name] = shards.get(factor.name, 1) * size
            if factor.size % shards[factor.name]:
                return False
    for dims, layout in zip(operands, strategy.operands, strict=True):
        if not _atoms_agree(dims, layout, strategy.factors, mesh):
            return False
    for result, layout in zip(rule.results, strategy.results, strict=True):
        if result is not None and not _atoms_agree(result, layout, strategy.factors, mesh):
            return False
    return True


def _atoms_agree(
    dims: Dims, layout: Layout, factors: Sequence[Factor | None], mesh: MeshSizes
) -> bool:
    """Each atom is named by one factor only, or by two that may share it, and divided evenly."""
    owner: dict[int, str] = {}
    shards: dict[int, int] = {}
    atoms = flat_atoms(dims)
    for placement, factor, size in zip(layout, factors, mesh, strict=True):
        if placement < 0 or factor is None:
            continue
        name = factor.shares or factor.name
        if owner.setdefault(placement, name) != name:
            return False
        shards[placement] = shards.get(placement, 1) * size
        if atoms[placement] % shards[placement]:
            return False
    return True


@lru_cache(maxsize=16384)
def layouts(dims: Dims, mesh: MeshSizes, *, partial: bool = False) -> tuple[Layout, ...]:
    """Every layout that a tensor can have on a mesh, the replicated one first."""
    atoms = flat_atoms(dims)
    per_axis = []
    for size in mesh:
        fits = [a for a, n in enumerate(atoms) if n and n % size == 0] if size > 1 else []
        per_axis.append([REPLICATE, *([PARTIAL] if partial and size > 1 else []), *fits])
    found = []
    for layout in itertools.product(*per_axis):
        shards: dict[int, int] = {}
        for placement, size in zip(layout, mesh, strict=True):
            if placement >= 0:
                shards[placement] = shards.get(placement, 1) * size
        if all(atoms[a] % n == 0 for a, n in shards.items()):
            found.append(layout)
    return tuple(found)
