"""Playing a local program: arguments of each rank, results by index, values freed."""

from __future__ import annotations

from typing import Any

import torch

from autopar.graph.program import Ref, TensorMeta
from autopar.layout import REPLICATE, Offset
from autopar.lowering.program import (
    CollectiveOp,
    Communicate,
    Compute,
    Instruction,
    LocalProgram,
    Port,
)
from autopar.mesh import LogicalMesh
from autopar.runtime.interpreter import run_program
from autopar.runtime.virtual import VirtualCollectives

aten = torch.ops.aten
META = TensorMeta((4,), torch.float32)


def _port(name: str, index: int = 0) -> Port:
    return Port(Ref(name, index), META, ((4,),), (REPLICATE,))


def _run(body: tuple[Instruction, ...], output: Ref, **constants: torch.Tensor) -> Any:
    outputs = {"y": _port(output.name, output.index)}
    program = LocalProgram({"x": _port("x")}, body, outputs, constants)
    return run_program(
        program,
        {"x": [torch.arange(4.0), torch.arange(4.0) + 10]},
        coordinates=[(0,), (1,)],
        collectives=VirtualCollectives(LogicalMesh((2,))),
        device=torch.device("cpu"),
    )["y"]


def test_an_offset_is_an_integer_of_the_rank() -> None:
    body = (Compute("y", aten.narrow.default, (Ref("x"), 0, Offset((2,)), 2), {}),)
    assert [t.tolist() for t in _run(body, Ref("y"))] == [[0, 1], [12, 13]]


def test_results_are_read_by_index() -> None:
    body = (
        Compute("parts", aten.split.Tensor, (Ref("x"), 2), {}),
        Compute("y", aten.cat.default, ([Ref("parts", 1), Ref("parts", 0)],), {}),
    )
    assert _run(body, Ref("y"))[0].tolist() == [2, 3, 0, 1]
    assert _run(body, Ref("parts", 1))[1].tolist() == [12, 13]


def test_collectives_see_all_ranks() -> None:
    body = (Communicate("y", CollectiveOp.ALL_REDUCE, Ref("x"), 0),)
    assert [t.tolist() for t in _run(body, Ref("y"))] == [[10, 12, 14, 16]] * 2


def test_constants_and_devices() -> None:
    body = (
        Compute("z", aten.zeros.default, ([4],), {"device": torch.device("meta")}),
        Compute("s", aten.add.Tensor, (Ref("z"), Ref("c")), {}),
        Compute("y", aten.add.Tensor, (Ref("s"), Ref("x")), {}),
    )
    assert _run(body, Ref("y"), c=torch.ones(4))[0].tolist() == [1, 2, 3, 4]
