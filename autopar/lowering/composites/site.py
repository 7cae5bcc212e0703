"""One operator being lowered: its call, strategy and local operands, and how to emit the call
anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.errors import InternalError
from autopar.graph.program import Operator, Ref, map_refs, refs_in
from autopar.layout import Dims, Layout, MeshSizes, Offset, atom_offsets, dim_of_atom, local_shape
from autopar.lowering.emitter import Emitter
from autopar.sharding.rule import Call, Rule
from autopar.sharding.strategy import Strategy


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One operator being lowered. locals: its operands' shards in the strategy's layouts."""

    emit: Emitter
    op: Operator
    call: Call
    rule: Rule
    strategy: Strategy
    locals: tuple[Ref, ...]

    @property
    def mesh(self) -> MeshSizes:
        return self.emit.mesh

    def result_shape(self, index: int = 0) -> list[int]:
        """Local shape of a result."""
        dims = self.rule.results[index]
        if dims is None:
            raise InternalError(f"{self.op} has no result {index}")
        return list(local_shape(dims, self.strategy.results[index], self.mesh))

    def operand_shape(self, index: int) -> list[int]:
        return list(
            local_shape(self.call.operands[index], self.strategy.operands[index], self.mesh)
        )

    def args(self) -> list[Any]:
        """The arguments with operands replaced by local values."""
        numbers = iter(self.locals)
        return list(map_refs(self.op.args, lambda _: next(numbers)))

    def kwargs(self) -> dict[str, Any]:
        numbers = iter(self.locals[len(refs_in(self.op.args)) :])
        return dict(map_refs(dict(self.op.kwargs), lambda _: next(numbers)))

    def call_with(self, changes: Mapping[int, Any]) -> tuple[Ref, ...]:
        """The same call with some positional arguments replaced."""
        args = self.args()
        for position, value in changes.items():
            args[position] = value
        return self.results(self.emit.compute(self.op.target, *args, **self.kwargs()))

    def fill(self, local: Ref, operand: int) -> Ref:
        """A value in the layout of an operand, its padding filled as that operand's was."""
        dims, layout = self.call.operands[operand], self.strategy.operands[operand]
        for number, axis, value in self.strategy.fills:
            if number == operand:
                local = self.emit.fill(local, dims, layout, axis, value)
        return local

    def results(self, first: Ref) -> tuple[Ref, ...]:
        return tuple(Ref(first.name, i) for i in range(len(self.op.results)))

    def offset(self, dims: Dims, layout: Layout, dim: int) -> Offset:
        """Global start of the shard along `dim`; only its first atom may be sharded."""
        return dim_offset(dims, layout, self.mesh, dim)


def dim_offset(dims: Dims, layout: Layout, mesh: MeshSizes, dim: int) -> Offset:
    """Global start of a shard along a dim of which only the first atom may be sharded."""
    first = sum(map(len, dims[:dim]))
    for placement in layout:
        if placement >= 0:
            where, part = dim_of_atom(dims, placement)
            if where == dim and part:
                raise InternalError(f"dim {dim} of {dims} is not sharded in one run: {layout}")
    if not dims[dim]:
        return Offset((0,) * len(mesh))
    inner = math.prod(dims[dim][1:])
    strides = atom_offsets(dims, layout, mesh)[first].strides
    return Offset(tuple(s * inner for s in strides))


Lowering = Callable[[Site], tuple[Ref, ...]]
