"""One program for a whole step, where a stage plays one microbatch and talks to no other stage.

    gather, forward, backward, reduce    one after the other, as one LocalProgram

so that what comes once per step can overlap with the rest (`compile.overlap`). Gradients of several
uses of one weight are summed. Inputs are keyed as the programs of the stage key them; parameters
are at rest. Outputs: LOSS, updated buffers by input name, gradients by the name of the input that
holds the parameter at rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from autopar.graph.program import Ref
from autopar.lowering.lower import LOSS, LoweredPlan, LoweredStage
from autopar.lowering.program import (
    Compute,
    Instruction,
    LocalProgram,
    Port,
    check_program,
    renamed,
)


def whole_step(lowered: LoweredPlan, index: int) -> LocalProgram | None:
    """The step of a stage as one program; None where it is more than one, as there are other stages
    or microbatches, or where parameters come from the host."""
    stage = lowered.stages[index]
    alone = len(lowered.stages) == 1 and lowered.schedule.num_microbatches == 1
    on_host = any(p.host for p in stage.parameters)
    return step_program(stage) if alone and stage.weights is None and not on_host else None


def step_program(stage: LoweredStage) -> LocalProgram:
    """Pre: one microbatch, no other stage. Post: check_program. O(instructions)."""
    join = _Joiner()
    parameters = join.add("g", stage.gather, {})
    made = join.add("f", stage.forward, parameters)
    gradients = join.add("b", stage.backward, {**parameters, **_only(made, stage.saved)})
    at_rest = join.add("r", stage.reduce, gradients)
    sources = {p.name: p.source for p in stage.parameters}
    owned = {p.source for p in stage.parameters if p.owned}
    outputs = {key: made[key] for key in (LOSS, *stage.buffers) if key in made}
    for name in stage.gradients:
        if sources[name] in owned:
            known = outputs.get(sources[name])
            total = at_rest[name] if known is None else join.sum(known, at_rest[name])
            outputs[sources[name]] = total
    return check_program(LocalProgram(join.inputs, tuple(join.body), outputs, join.constants))


class _Joiner:
    """Programs one after the other (a builder, local to one call). Names of values get the prefix
    of their program."""

    def __init__(self) -> None:
        self.body: list[Instruction] = []
        self.inputs: dict[str, Port] = {}
        self.constants: dict[str, torch.Tensor] = {}

    def add(self, prefix: str, program: LocalProgram, given: Mapping[str, Port]) -> dict[str, Port]:
        """The outputs by key. given: values made before, by the keys of the inputs that take them;
        other inputs are those of the whole."""
        known: dict[str, Ref] = {}
        for key, port in program.inputs.items():
            if key in given:
                known[port.ref.name] = given[key].ref
            else:
                whole = self.inputs.setdefault(key, replace(port, ref=Ref(f"in_{key}")))
                known[port.ref.name] = whole.ref

        def known_as(ref: Ref) -> Ref:
            return known.get(ref.name) or Ref(f"{prefix}_{ref.name}", ref.index)

        self.body += [renamed(i, f"{prefix}_{i.name}", known_as) for i in program.body]
        self.constants |= {f"{prefix}_{n}": value for n, value in program.constants.items()}
        return {k: replace(p, ref=known_as(p.ref)) for k, p in program.outputs.items()}

    def sum(self, one: Port, other: Port) -> Port:
        name = f"sum_{len(self.body)}"
        add = torch.ops.aten.add.Tensor
        self.body.append(Compute(name, add, (one.ref, other.ref), {}, name))
        return replace(one, ref=Ref(name))


def _only(values: Mapping[str, Port], names: tuple[str, ...]) -> dict[str, Port]:
    return {name: values[name] for name in names}
