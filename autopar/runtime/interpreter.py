"""Plays a local program, for one rank or for all ranks of a mesh in lockstep.

Every value is a list with one tensor per rank that this process plays: one in a real job, all of
them on the virtual mesh. Collectives get the whole list, so both worlds run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from autopar.graph.program import Ref
from autopar.layout import Offset
from autopar.lowering.program import (
    Communicate,
    Exchange,
    Instruction,
    LocalProgram,
    reads_of,
)

Shards = list[Tensor]


class Collectives(Protocol):
    """Collectives over one axis of one stage's mesh, on the shards that this process plays."""

    def run(self, op: str, shards: Shards, axis: int, reduce: str) -> Shards: ...

    def exchange(self, rows: Shards, sends: Shards, receives: Shards, axis: int) -> Shards: ...


class ProgramPlayer(Protocol):
    """Plays one program."""

    @property
    def lends(self) -> bool:
        """Whether results of the last call are overwritten by the next one: each is the same tensor
        then, in memory that no other result sees."""
        ...

    @property
    def addends(self) -> Mapping[str, Tensor]:
        """What is to be added to results of the last call, by their names, in memory that the next
        one overwrites: of results that were announced as gradients."""
        ...

    def __call__(self, inputs: MutableMapping[str, Shards]) -> dict[str, Shards]:
        """`inputs` is emptied: whoever still needs a value keeps it elsewhere, and every other one
        is freed after its last reader."""
        ...

    def prepare(self, examples: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
        """Does ahead of the first call what can be done ahead, without the device. examples: fake,
        like one rank's inputs will be. Fake results: those whose strides are known."""
        ...


PlayerMaker = Callable[[LocalProgram], ProgramPlayer]


class InterpretedProgram:
    """A program with what each run of it needs anew: constants on the device, last uses."""

    lends = False
    addends: Mapping[str, Tensor] = {}

    def __init__(
        self,
        program: LocalProgram,
        *,
        coordinates: Sequence[tuple[int, ...]],
        collectives: Collectives,
        device: torch.device,
    ) -> None:
        self._program = program
        self._last_uses = program.last_uses()
        reads = {ref for instruction in program.body for ref in reads_of(instruction)}
        self._wanted = reads | {port.ref for port in program.outputs.values()}
        self._coordinates = tuple(coordinates)
        self._collectives = collectives
        self._device = device
        self._constants = {name: t.to(device) for name, t in program.constants.items()}

    def prepare(self, examples: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
        """Nothing to do; known are the inputs that are results."""
        del mode
        given = {port.ref: examples[key] for key, port in self._program.inputs.items()}
        ports = self._program.outputs.items()
        return {key: given[port.ref] for key, port in ports if port.ref in given}

    def __call__(self, inputs: MutableMapping[str, Shards]) -> dict[str, Shards]:
        values: dict[Ref, Shards] = {
            port.ref: inputs.pop(key) for key, port in self._program.inputs.items()
        }
        inputs.clear()
        for name, tensor in self._constants.items():
            values[Ref(name)] = [tensor] * len(self._coordinates)
        for instruction, dead in zip(self._program.body, self._last_uses, strict=True):
            values |= {
                Ref(instruction.name, index): shards
                for index, shards in enumerate(self._results(instruction, values))
                if Ref(instruction.name, index) in self._wanted
            }
            for ref in dead:
                del values[ref]
        return {key: values[port.ref] for key, port in self._program.outputs.items()}

    def _results(self, instruction: Instruction, values: Mapping[Ref, Shards]) -> list[Shards]:
        """By number. Each is freed for itself: of a norm's backward two stay to the end."""
        if isinstance(instruction, Communicate):
            shards = values[instruction.operand]
            run = self._collectives.run
            return [run(instruction.op, shards, instruction.axis, instruction.reduce)]
        if isinstance(instruction, Exchange):
            rows, sends = values[instruction.rows], values[instruction.sends]
            receives = values[instruction.receives]
            return [self._collectives.exchange(rows, sends, receives, instruction.axis)]
        made = [
            instruction.target(
                *_bind(instruction.args, values, rank, coords),
                **_bind_kwargs(instruction.kwargs, values, rank, coords, self._device),
            )
            for rank, coords in enumerate(self._coordinates)
        ]
        if isinstance(made[0], (tuple, list)):
            return [list(shards) for shards in zip(*made, strict=True)]
        return [made]


def interpreter(
    coordinates: Sequence[tuple[int, ...]], collectives: Collectives, device: torch.device
) -> PlayerMaker:
    """Makes players for the ranks at these coordinates."""

    def make(program: LocalProgram) -> ProgramPlayer:
        return InterpretedProgram(
            program, coordinates=coordinates, collectives=collectives, device=device
        )

    return make


def run_program(
    program: LocalProgram,
    inputs: Mapping[str, Shards],
    *,
    coordinates: Sequence[tuple[int, ...]],
    collectives: Collectives,
    device: torch.device,
) -> dict[str, Shards]:
    """Outputs by key, of a program that is run once. coordinates: of each rank played."""
    player = InterpretedProgram(
        program, coordinates=coordinates, collectives=collectives, device=device
    )
    return player(dict(inputs))


def _bind(tree: Any, values: Mapping[Ref, Shards], rank: int, coords: tuple[int, ...]) -> Any:
    """The arguments of one rank."""
    if isinstance(tree, Ref):
        return values[tree][rank]
    if isinstance(tree, Offset):
        return tree.at(coords)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_bind(item, values, rank, coords) for item in tree)
    return tree


def _bind_kwargs(
    kwargs: Mapping[str, Any],
    values: Mapping[Ref, Shards],
    rank: int,
    coords: tuple[int, ...],
    device: torch.device,
) -> dict[str, Any]:
    bound = {key: _bind(item, values, rank, coords) for key, item in kwargs.items()}
    if bound.get("device") is not None:  # captured on fake cpu
        bound["device"] = device
    return bound
