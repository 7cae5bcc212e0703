"""Builds one local program: emits instructions and keeps each value in the layouts it is needed in.

The only mutable object of the lowering; it lives inside `spmd.lower_program`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autopar.graph.program import Ref
from autopar.layout import (
    Dims,
    Layout,
    MeshSizes,
    Offset,
    atom_offsets,
    flat_atoms,
    local_atoms,
    local_shape,
)
from autopar.lowering.program import CollectiveOp, Communicate, Compute, Exchange, Instruction
from autopar.sharding.reshard import Step, StepKind, reshard_steps

aten = torch.ops.aten
CPU = torch.device("cpu")  # stands for the device that runs the program


class Emitter:
    """Instructions so far, and for each value the local values that stand for it, by layout."""

    def __init__(self, mesh: MeshSizes) -> None:
        self.mesh = mesh
        self.body: list[Instruction] = []
        self.origin = ""
        self._copies: dict[Ref, dict[Layout, Ref]] = {}
        self._made_in: dict[Ref, Layout] = {}
        self._dims: dict[Ref, Dims] = {}
        self._filled: dict[tuple[Ref, int, float], Ref] = {}

    def compute(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Emits a call; returns its first result."""
        name = f"{self.origin}_{len(self.body)}" if self.origin else f"l{len(self.body)}"
        self.body.append(Compute(name, target, args, kwargs, self.origin))
        return Ref(name)

    def communicate(self, op: CollectiveOp, operand: Ref, axis: int, reduce: str = "sum") -> Ref:
        name = f"{self.origin}_{op}_{len(self.body)}"
        self.body.append(Communicate(name, op, operand, axis, reduce, self.origin))
        return Ref(name)

    def exchange(self, rows: Ref, sends: Ref, receives: Ref, axis: int) -> Ref:
        name = f"{self.origin}_exchange_{len(self.body)}"
        self.body.append(Exchange(name, rows, sends, receives, axis, self.origin))
        return Ref(name)

    def all_reduce(self, operand: Ref, axes: tuple[int, ...], reduce: str = "sum") -> Ref:
        for axis in axes:
            operand = self.communicate(CollectiveOp.ALL_REDUCE, operand, axis, reduce)
        return operand

    def fill(self, local: Ref, dims: Dims, layout: Layout, axis: int, value: float) -> Ref:
        """The shard with `value` in the padding that this axis leaves. Made once."""
        key = (local, axis, value)
        if key not in self._filled:
            atoms, atom = local_atoms(dims, layout, self.mesh), layout[axis]
            strides = tuple(-atoms[atom] if a == axis else 0 for a in range(len(self.mesh)))
            rows = Offset(strides, flat_atoms(dims)[atom])  # from the shard's start to the end
            index = self.compute(aten.arange.default, atoms[atom], device=CPU)
            beyond = self.compute(aten.ge.Scalar, index, rows)
            ones = [1] * (len(atoms) - atom - 1)
            mask = self.compute(aten.reshape.default, beyond, [atoms[atom], *ones])
            view = self.compute(aten.reshape.default, local, list(atoms))
            filled = self.compute(aten.masked_fill.Scalar, view, mask, value)
            shape = list(local_shape(dims, layout, self.mesh))
            self._filled[key] = self.compute(aten.reshape.default, filled, shape)
        return self._filled[key]

    def define(self, value: Ref, dims: Dims, layout: Layout, local: Ref) -> None:
        """`local` is the shard of `value` in this layout, as its producer made it."""
        self._copies[value] = {layout: local}
        self._made_in[value] = layout
        self._dims[value] = dims

    def layout_of(self, value: Ref) -> Layout:
        return self._made_in[value]

    def get(self, value: Ref, layout: Layout) -> Ref:
        """The shard of `value` in `layout`, resharded from the producer's layout at most once."""
        copies = self._copies[value]
        if layout not in copies:
            source = self._made_in[value]
            copies[layout] = self._reshard(copies[source], self._dims[value], source, layout)
        return copies[layout]

    def _reshard(self, local: Ref, dims: Dims, source: Layout, target: Layout) -> Ref:
        current = list(source)
        origin, self.origin = self.origin, f"{self.origin}_reshard" if self.origin else "reshard"
        for step in reshard_steps(source, target):
            before = tuple(current)
            current[step.axis] = _after(step)
            local = self._step(local, step, dims, before, tuple(current))
        self.origin = origin
        return local

    def _step(self, local: Ref, step: Step, dims: Dims, before: Layout, after: Layout) -> Ref:
        """before, after: the layouts around the step."""
        n = self.mesh[step.axis]
        atoms, rest = local_atoms(dims, before, self.mesh), local_atoms(dims, after, self.mesh)
        shape = list(local_shape(dims, after, self.mesh))
        if step.kind is StepKind.ALL_REDUCE:
            return self.communicate(CollectiveOp.ALL_REDUCE, local, step.axis)
        if step.kind is StepKind.TO_PARTIAL:
            first = Offset(tuple(int(a == step.axis) for a in range(len(self.mesh))))
            return self.compute(torch.ops.autopar.keep_on_first.default, local, first)
        if step.kind is StepKind.SLICE:
            start = atom_offsets(dims, after, self.mesh)[step.target]
            start = Offset(tuple(s if a == step.axis else 0 for a, s in enumerate(start.strides)))
            view = self.compute(aten.reshape.default, local, list(atoms))
            narrow = torch.ops.autopar.padded_narrow.default
            part = self.compute(narrow, view, step.target, start, rest[step.target])
            return self.compute(aten.reshape.default, part, shape)
        if step.kind is StepKind.ALL_GATHER:
            gathered = self.communicate(
                CollectiveOp.ALL_GATHER, self._contiguous(local, atoms), step.axis
            )
            return self._join(gathered, n, atoms, step.source, rest, shape)
        split = self._split(local, n, atoms, step.target, rest[step.target])
        if step.kind is StepKind.REDUCE_SCATTER:
            scattered = self.communicate(CollectiveOp.REDUCE_SCATTER, split, step.axis)
            return self.compute(aten.reshape.default, scattered, shape)
        exchanged = self.communicate(CollectiveOp.ALL_TO_ALL, split, step.axis)
        parts = tuple(rest[i] if i == step.target else a for i, a in enumerate(atoms))
        return self._join(exchanged, n, parts, step.source, rest, shape)

    def _contiguous(self, local: Ref, atoms: tuple[int, ...]) -> Ref:
        """As [1, atoms..], so that a gather stacks along a new leading dim."""
        view = self.compute(aten.reshape.default, local, [1, *atoms])
        return self.compute(aten.contiguous.default, view)

    def _split(self, local: Ref, n: int, atoms: tuple[int, ...], atom: int, rows: int) -> Ref:
        """[atoms..] -> [n, atoms.. with `rows` in place of `atom`], contiguous; zeros fill up."""
        if atoms[atom] != n * rows:
            local = self.compute(aten.reshape.default, local, list(atoms))
            padding = [0, 0] * (len(atoms) - 1 - atom) + [0, n * rows - atoms[atom]]
            local = self.compute(aten.constant_pad_nd.default, local, padding)
        shape = [*atoms[:atom], n, rows, *atoms[atom + 1 :]]
        view = self.compute(aten.reshape.default, local, shape)
        if atom:
            order = [atom, *(i for i in range(len(shape)) if i != atom)]
            view = self.compute(aten.permute.default, view, order)
        return self.compute(aten.contiguous.default, view)

    def _join(
        self,
        stacked: Ref,
        n: int,
        parts: tuple[int, ...],
        atom: int,
        atoms: tuple[int, ...],
        shape: list[int],
    ) -> Ref:
        """[n, parts..] -> [atoms..] as `shape`: the leading dim is the major part of `atom`, whose
        padding is dropped."""
        view = self.compute(aten.reshape.default, stacked, [n, *parts])
        if any(a != 1 for a in parts[:atom]):
            order = [*range(1, atom + 1), 0, *range(atom + 1, len(parts) + 1)]
            view = self.compute(aten.permute.default, view, order)
        if n * parts[atom] != atoms[atom]:
            padded = [*parts[:atom], n * parts[atom], *parts[atom + 1 :]]
            view = self.compute(aten.reshape.default, view, padded)
            view = self.compute(aten.narrow.default, view, atom, 0, atoms[atom])
            view = self.compute(aten.contiguous.default, view)  # layer norm's kernel needs it
        return self.compute(aten.reshape.default, view, shape)


def _after(step: Step) -> int:
    """Placement of the axis after a step."""
    if step.kind is StepKind.TO_PARTIAL:
        return -2
    return step.target
