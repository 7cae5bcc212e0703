"""What a compiled program holds while it runs."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

import torch
from torch import Tensor

from autopar.compile.inductor import CompiledModule
from autopar.graph.program import Ref
from autopar.lowering.program import LocalProgram
from autopar.runtime.compiled import CompiledProgram
from tests.programs import call, port

aten = torch.ops.aten


def test_inputs_are_freed_after_their_last_use() -> None:
    """As what forward saved must be while backward runs."""
    body = (call("y", aten.mul.Tensor, Ref("x"), Ref("x")),)
    program = LocalProgram({"x": port("x", 8)}, body, {"y": port("y", 8)}, {})
    player = CompiledProgram(program, coordinates=(), groups=(), device=torch.device("cpu"))
    found = []

    def inputs() -> MutableMapping[str, list[Tensor]]:
        return {"x": [torch.arange(8.0)]}

    want = player(inputs())["y"][0]
    compiled = player._compiled
    assert compiled is not None

    def spy(values: list[Tensor]) -> list[Tensor]:
        (x,) = values
        alive = weakref.ref(x)
        y = x * x
        del x
        values.clear()
        found.append(alive())
        return [y]

    player._compiled = CompiledModule(spy, compiled.results)
    got = player(inputs())["y"][0]
    assert found == [None]
    assert torch.equal(got, want)
