"""Local programs: what one rank of a stage runs, the same text for all ranks.

Operators have local shapes in their arguments; an integer that differs between ranks is an Offset.
Collectives name a mesh axis and work on dim 0, as functional collectives do. Shapes are static but
between two exchanges of rows, whose numbers are values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch

from autopar.errors import InternalError
from autopar.graph.program import Ref, TensorMeta, map_refs, refs_in
from autopar.layout import Dims, Layout


class CollectiveOp(StrEnum):
    """Collectives over one mesh axis. All but all_reduce split or join along dim 0."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True, slots=True)
class Compute:
    """A call on local tensors. origin: name of the graph operator it was lowered from."""

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Communicate:
    """A collective. reduce: "sum" or "max"."""

    name: str
    op: CollectiveOp
    operand: Ref
    axis: int
    reduce: str = "sum"
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Rows change devices along an axis: an all-to-all of runs of rows of any lengths.

    sends[i]: how many rows go to coordinate i, in order, from the first row on; what is left stays
    behind. receives[i]: how many come from coordinate i, in that order. Both int64 [axis size], on
    the host.
    """

    name: str
    rows: Ref
    sends: Ref
    receives: Ref
    axis: int
    origin: str = ""


Instruction = Compute | Communicate | Exchange


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a program: its value, global meta, dims and layout on the stage's
    mesh. host: whether its shards are in the memory of the device's host, not on the device."""

    ref: Ref
    meta: TensorMeta
    dims: Dims
    layout: Layout
    host: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LocalProgram:
    """inputs and outputs are keyed by the names that the stage gives them."""

    inputs: Mapping[str, Port]
    body: tuple[Instruction, ...]
    outputs: Mapping[str, Port]
    constants: Mapping[str, torch.Tensor]

    def last_uses(self) -> tuple[tuple[Ref, ...], ...]:
        """Values whose last reader is each instruction, so that an executor frees them there; of
        those that it makes, those that nothing reads are not among them."""
        seen = {port.ref for port in self.outputs.values()}
        frees: list[tuple[Ref, ...]] = []
        for instruction in reversed(self.body):
            refs = dict.fromkeys(reads_of(instruction))
            frees.append(tuple(ref for ref in refs if ref not in seen))
            seen.update(refs)
        return tuple(reversed(frees))


def reads_of(instruction: Instruction) -> tuple[Ref, ...]:
    if isinstance(instruction, Communicate):
        return (instruction.operand,)
    if isinstance(instruction, Exchange):
        return (instruction.rows, instruction.sends, instruction.receives)
    return tuple(refs_in((instruction.args, dict(instruction.kwargs))))


def live_readers(program: LocalProgram) -> Counter[str]:
    """How many times the results of each instruction are read, by what is not dead: views that were
    made again, say, for a gradient that is made otherwise now."""
    readers = Counter(port.ref.name for port in program.outputs.values())
    for instruction in reversed(program.body):
        if readers[instruction.name] or not isinstance(instruction, Compute):
            readers.update(ref.name for ref in reads_of(instruction))
    return readers


def renamed(instruction: Instruction, name: str, known_as: Callable[[Ref], Ref]) -> Instruction:
    """The same under another name, of other values."""
    if isinstance(instruction, Communicate):
        return replace(instruction, name=name, operand=known_as(instruction.operand))
    if isinstance(instruction, Exchange):
        rows, sends = known_as(instruction.rows), known_as(instruction.sends)
        receives = known_as(instruction.receives)
        return replace(instruction, name=name, rows=rows, sends=sends, receives=receives)
    args = map_refs(instruction.args, known_as)
    kwargs = map_refs(dict(instruction.kwargs), known_as)
    return replace(instruction, name=name, args=args, kwargs=kwargs)


def check_program(program: LocalProgram) -> LocalProgram:
    """Verifier: each value is made once and before it is read; outputs exist."""
    made = {port.ref.name for port in program.inputs.values()} | set(program.constants)
    for instruction in program.body:
        for ref in reads_of(instruction):
            if ref.name not in made:
                raise InternalError(
                    f"{instruction.name} reads {ref}, which nothing before it makes"
                )
        if instruction.name in made:
            raise InternalError(f"two instructions are called {instruction.name!r}")
        made.add(instruction.name)
    for key, port in program.outputs.items():
        if port.ref.name not in made:
            raise InternalError(f"output {key!r} is {port.ref}, which nothing makes")
    return program
