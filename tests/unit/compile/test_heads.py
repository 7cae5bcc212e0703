"""Keys and values that a model repeats for groups of heads, as compiled code reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.compile.heads import group_heads
from autopar.graph.program import Ref, TensorMeta, map_refs
from autopar.layout import raw_dims
from autopar.lowering.program import Compute, LocalProgram, Port

aten, own = torch.ops.aten, torch.ops.autopar

B, G, R, S, D = 2, 2, 3, 5, 4
SHAPES = {
    "q": (B, G * R, S, D),
    "k": (B, S, G, D),
    "v": (B, G, S, D),
    "dout": (B, G * R, S, D),
}


def port(name: str, shape: tuple[int, ...]) -> Port:
    meta = TensorMeta(shape, torch.float64)
    return Port(Ref(name), meta, raw_dims(shape), ())


def attention(kept: bool, single: bool = False) -> LocalProgram:
    """Keys that are transposed first, as projections make them. kept: the sum keeps its dim.
    single: the gradient of the keys leaves before it is summed, too."""
    body: list[Compute] = []

    def call(name: str, target: Any, *args: Any) -> Ref:
        body.append(Compute(name, target, args, {}))
        return Ref(name)

    def repeat(name: str, x: Ref) -> Ref:
        narrow = call(f"{name}_narrow", aten.reshape.default, x, [B, G, 1, S, D])
        wide = call(f"{name}_wide", aten.expand.default, narrow, [B, G, R, S, D])
        copy = call(f"{name}_copy", aten.clone.default, wide)
        return call(f"{name}_whole", aten.reshape.default, copy, [B, G * R, S, D])

    keys = repeat("keys", call("heads", aten.transpose.int, Ref("k"), 1, 2))
    values, rest = repeat("values", Ref("v")), (True, 0.5)
    call("sdpa", own.sdpa.default, Ref("q"), keys, values, None, *rest)
    saved = (Ref("q"), keys, values, None, Ref("sdpa"), Ref("sdpa", 1))
    call("back", own.sdpa_backward.default, Ref("dout"), *saved, *rest)
    outputs = {"out": port("sdpa", SHAPES["q"]), "dq": port("back", SHAPES["q"])}
    for index, name in ((1, "dk"), (2, "dv")):
        view = call(f"{name}_view", aten.reshape.default, Ref("back", index), [B, G, R, S, D])
        total = call(f"{name}_sum", aten.sum.dim_IntList, view, [2], kept)
        made = call(name, aten.reshape.default, total, [B, G, S, D])
        outputs[name] = port(made.name, (B, G, S, D))
    if single:
        outputs["wide"] = replace(port("back", SHAPES["q"]), ref=Ref("back", 1))
    return LocalProgram({n: port(n, s) for n, s in SHAPES.items()}, tuple(body), outputs, {})


def run(program: LocalProgram, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Any] = dict(values)

    def read(ref: Ref) -> Any:
        value = made[ref.name]
        return value[ref.index] if isinstance(value, tuple) else value

    for call in program.body:
        assert isinstance(call, Compute)
        made[call.name] = call.target(*map_refs(call.args, read))
    return {name: read(out.ref) for name, out in program.outputs.items()}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_heads_of_a_group(kept: bool, single: bool) -> None:
    """Backward stays as it is where somebody reads the gradient of single heads."""
    program = attention(kept, single)
    grouped = group_heads(program)
    names = {call.name for call in grouped.body}
    assert {"sdpa_group1", "sdpa_group2"} <= names
    assert ("back_group2" in names) == ("back_group3" in names) == (not single)
    assert ("dk_view" in names) == single
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    want, got = run(program, values), run(grouped, values)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
