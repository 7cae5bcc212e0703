"""A GELU and its gradient go into the product that they follow, as one operator each.

    x = a @ b + bias;  y = gelu(x)    ->    y, x = linear_gelu(a, b, bias)
    gelu_backward(a @ b, x)           ->    gelu_gradient(a, b, x)

where nothing else reads the product. Only the tanh formula is an epilogue of products. Where a
device has no kernel for them, `compile.kernels` takes the operators apart again.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

import autopar.ops  # noqa: F401  (registers autopar::linear_gelu)
from autopar.compile.heads import RESHAPES
from autopar.graph.program import Ref
from autopar.lowering.program import (
    Compute,
    Instruction,
    LocalProgram,
    check_program,
    live_readers,
    renamed,
)

aten, own = torch.ops.aten, torch.ops.autopar

_PRODUCT, _SUM = aten.mm.default, aten.add.Tensor
_GELU, _GRADIENT = aten.gelu.default, aten.gelu_backward.default
_FIRST = 0  # the kernel that the heuristic puts first, unless another is chosen


def join_activations(program: LocalProgram) -> LocalProgram:
    """The same outputs to rounding. A gradient's product stays where it was, if what its slope is
    taken at is there by then: later it would hold its operands, and the memory that a collective
    is to have next, for longer. What is left unread is dead. Post: check_program.
    O(instructions)."""
    find = _Finder(program)
    behind: defaultdict[str, list[Compute]] = defaultdict(list)  # an instruction, by its name
    now: dict[str, Compute | Ref] = {}  # what an instruction is now
    for call in find.calls.values():
        if call.kwargs.get("approximate") != "tanh" or not find.is_read(call):
            continue
        if call.target is _GELU:
            total, shape = find.unshaped(call.args[0])
            operands = find.linear(total)
            if operands is None or total.name in now:
                continue
            both = _call(f"{total.name}_and_gelu", own.linear_gelu.default, operands, call)
            behind[total.name].insert(0, both)  # a gradient behind the sum reads it
            now[total.name] = Ref(both.name, 1)
            now[call.name] = _reshaped(call, Ref(both.name), shape)
        elif call.target is _GRADIENT:
            product = find.product(call.args[0])
            if product is None:
                continue
            x, shape = find.unshaped(call.args[1])
            first = find.later(product.name, x.name)
            operands = (*product.args, x, _FIRST)
            made = _call(f"{product.name}_by_gelu", own.gelu_gradient.default, operands, call)
            behind[first].append(made)
            now[call.name] = _reshaped(call, Ref(made.name), shape)
    if not behind:
        return program

    def known(ref: Ref) -> Ref:
        replaced = now.get(ref.name)
        return replaced if isinstance(replaced, Ref) else ref

    body: list[Instruction] = []
    for instruction in program.body:
        is_now = now.get(instruction.name, instruction)
        body += [] if isinstance(is_now, Ref) else [is_now]
        body += behind[instruction.name]
    outputs = {key: replace(p, ref=known(p.ref)) for key, p in program.outputs.items()}
    named = tuple(renamed(i, i.name, known) for i in body)
    return check_program(replace(program, body=named, outputs=outputs))


def _reshaped(call: Compute, value: Ref, shape: Any | None) -> Compute | Ref:
    """What a call is whose value is this one in another shape, or in its own."""
    return value if shape is None else _call(call.name, aten.reshape.default, (value, shape), call)


class _Finder:
    """What makes the values of a program, and who reads them."""

    def __init__(self, program: LocalProgram) -> None:
        self.calls = {i.name: i for i in program.body if isinstance(i, Compute)}
        self._readers = live_readers(program)
        self._order = {i.name: position for position, i in enumerate(program.body)}

    def later(self, one: str, other: str) -> str:
        """The later of two instructions; inputs come before all of them."""
        return max(one, other, key=lambda name: self._order.get(name, -1))

    def is_read(self, call: Compute) -> bool:
        return self._readers[call.name] > 0

    def product(self, ref: Ref) -> Compute | None:
        """The product that makes a value that is read once, in any shape."""
        call = self.calls.get(ref.name)
        if call is None or self._readers[ref.name] != 1:
            return None
        if call.target in RESHAPES:
            return self.product(call.args[0])
        return call if call.target is _PRODUCT else None

    def linear(self, ref: Ref) -> tuple[Any, ...] | None:
        """Operands of `linear_gelu` for a value a @ b + bias."""
        call = self.calls.get(ref.name)
        if call is None or call.target is not _SUM or call.kwargs:
            return None
        value, bias = call.args
        product = self.product(value) if isinstance(value, Ref) else None
        if product is None or product.name != value.name or not isinstance(bias, Ref):
            return None  # a sum in another shape than the product's would lose it
        return (*product.args, bias, _FIRST)

    def unshaped(self, ref: Ref) -> tuple[Ref, Any]:
        """What a value is in another shape, and its own shape, if it has another."""
        call, shape = self.calls.get(ref.name), None
        while call is not None and call.target in RESHAPES:
            shape = call.args[1] if shape is None else shape
            ref = call.args[0]
            call = self.calls.get(ref.name)
        return ref, shape


def _call(name: str, target: Any, args: tuple[Any, ...], like: Compute) -> Compute:
    return Compute(name, target, args, {}, like.origin)
