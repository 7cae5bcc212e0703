"""Attention whose keys and values a model repeats for the query heads of a group reads them once.

    sdpa(q, repeat(k), repeat(v))                      ->  sdpa(q, k, v)
    dk, dv = sdpa_backward(.., repeat(k), repeat(v))   ->  of k, v
    sum of dk over a group's heads                     ->  dk

where repeat(x) = reshape(expand(x [B, G, 1, T, D], [B, G, R, T, D]), [B, G R, T, D]), as
transformers and the Llama paper's code write it; likewise with dropout inside. Kernels for
attention take the groups as they are (`ops.attention`); sums over a group then stay in their
accumulator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import autopar.ops  # noqa: F401  (registers autopar::sdpa)
from autopar.graph.program import Ref
from autopar.lowering.program import (
    Compute,
    Instruction,
    LocalProgram,
    check_program,
    reads_of,
)

aten, own = torch.ops.aten, torch.ops.autopar

RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})
_COPIES = frozenset({aten.clone.default})
_EXPANDS = frozenset({aten.expand.default})
_SUMS = frozenset({aten.sum.dim_IntList})
_KEYS: Mapping[object, int] = {  # then values
    own.sdpa.default: 1,
    own.sdpa_backward.default: 2,
    own.sdpa_dropout.default: 1,
    own.sdpa_dropout_backward.default: 2,
}
_BACKWARD = frozenset({own.sdpa_backward.default, own.sdpa_dropout_backward.default})


def group_heads(program: LocalProgram) -> LocalProgram:
    """The same outputs to rounding. What is left unread is dead. Post: check_program.
    O(instructions)."""
    walk = _Walk(program)
    body = tuple(new for i in program.body for new in walk.step(i))
    return check_program(replace(program, body=body)) if walk.changed else program


class _Repeat(NamedTuple):
    """A value that is repeated: source, in any shape, is [B, G, T, D]."""

    source: Ref
    sizes: tuple[int, ...]  # [B, G, R, T, D]

    @property
    def group(self) -> list[int]:
        return [*self.sizes[:2], *self.sizes[3:]]


class _Walk:
    """What a walk over a program has seen (local to one call)."""

    def __init__(self, program: LocalProgram) -> None:
        self.changed = False
        self._made = {i.name: i for i in program.body if isinstance(i, Compute)}
        self._readers: dict[Ref, list[Any]] = defaultdict(list)
        for instruction in program.body:
            for ref in reads_of(instruction):
                self._readers[ref].append(instruction)
        for port in program.outputs.values():
            self._readers[port.ref].append(port)
        self._now: dict[str, list[Instruction]] = {}  # views of gradients and their sums

    def step(self, instruction: Instruction) -> list[Instruction]:
        """What stands in its place."""
        if instruction.name in self._now:
            return self._now[instruction.name]
        position = _KEYS.get(getattr(instruction, "target", None))
        if position is None or not isinstance(instruction, Compute):
            return [instruction]
        keys, values = (self._repeat(ref) for ref in instruction.args[position : position + 2])
        if keys is None or values is None or keys.sizes[:4] != values.sizes[:4]:
            return [instruction]
        if instruction.target in _BACKWARD:
            gradients = Ref(instruction.name, 1), Ref(instruction.name, 2)
            dk, dv = self._sums(gradients[0], keys), self._sums(gradients[1], values)
            if dk is None or dv is None:
                return [instruction]
            self._now |= dk | dv
        self.changed = True
        grouped: list[Instruction] = []
        args = list(instruction.args)
        for place, repeat in enumerate((keys, values), position):
            name = f"{instruction.name}_group{place}"
            view = (repeat.source, repeat.group)
            grouped.append(Compute(name, aten.reshape.default, view, {}, instruction.origin))
            args[place] = Ref(name)
        return [*grouped, replace(instruction, args=tuple(args))]

    def _repeat(self, ref: Ref) -> _Repeat | None:
        whole = self._call(ref, RESHAPES)
        if whole is None:
            return None
        copy = self._call(whole.args[0], _COPIES)
        wide = self._call((copy or whole).args[0], _EXPANDS)
        narrow = None if wide is None else self._call(wide.args[0], RESHAPES)
        if wide is None or narrow is None or len(wide.args[1]) != 5:
            return None
        batch, groups, times, length, width = wide.args[1]
        is_repeat = list(narrow.args[1]) == [batch, groups, 1, length, width]
        is_repeat &= list(whole.args[1]) == [batch, groups * times, length, width]
        return _Repeat(narrow.args[0], tuple(wide.args[1])) if is_repeat else None

    def _sums(self, gradient: Ref, repeat: _Repeat) -> dict[str, list[Instruction]] | None:
        """What stands for the views of the gradient of what is repeated, nothing, and for their
        sums over a group's heads; None where the gradient of a single head is read."""
        now: dict[str, list[Instruction]] = {}
        for view in self._readers[gradient]:
            if not _calls(view, RESHAPES) or tuple(view.args[1]) != repeat.sizes:
                return None
            now[view.name] = []
            for total in self._readers[Ref(view.name)]:
                if not _calls(total, _SUMS) or list(total.args[1]) != [2] or total.kwargs:
                    return None
                kept = [1] if len(total.args) > 2 and total.args[2] else []
                shape = [*repeat.sizes[:2], *kept, *repeat.sizes[3:]]
                reshape = replace(total, target=aten.reshape.default, args=(gradient, shape))
                now[total.name] = [reshape]
        return now

    def _call(self, ref: Ref, targets: Collection[object]) -> Compute | None:
        """The call that makes the value, if it is one of these."""
        made = self._made.get(ref.name)
        return made if made is not None and _calls(made, targets) else None


def _calls(reader: Any, targets: Collection[object]) -> bool:
    return isinstance(reader, Compute) and reader.target in targets
