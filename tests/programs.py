"""Local programs that tests write down, and play as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autopar.graph.program import Ref, TensorMeta
from autopar.lowering.program import Compute, LocalProgram, Port


def port(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Port:
    return Port(Ref(name), TensorMeta(shape, dtype), tuple((n,) for n in shape), ())


def call(name: str, target: Callable[..., object], *args: object, **kwargs: object) -> Compute:
    return Compute(name, target, args, kwargs, name)


def played(program: LocalProgram, values: dict[str, Tensor]) -> list[Tensor]:
    made: dict[str, object] = {p.ref.name: values[key] for key, p in program.inputs.items()}

    def read(ref: Ref) -> Tensor:
        value = made[ref.name]
        found = value[ref.index] if isinstance(value, tuple) else value
        assert isinstance(found, Tensor)
        return found

    for instruction in program.body:
        assert isinstance(instruction, Compute)
        args = [read(a) if isinstance(a, Ref) else a for a in instruction.args]
        made[instruction.name] = instruction.target(*args, **instruction.kwargs)
    return [read(p.ref) for p in program.outputs.values()]


def targets(program: LocalProgram) -> list[object]:
    return [i.target for i in program.body if isinstance(i, Compute)]
