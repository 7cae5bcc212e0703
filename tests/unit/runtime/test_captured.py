"""A captured program on the CPU: a recording that runs the program anew stands for the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence

import pytest
import torch
from torch import Tensor

from autopar.compile.inductor import CompiledModule
from autopar.graph.program import Ref, TensorMeta
from autopar.lowering.program import Compute, LocalProgram, Port
from autopar.runtime.captured import (
    LAUNCH_BOUND_S,
    SHORT_S,
    CapturedProgram,
    Recording,
    Results,
)
from autopar.runtime.compiled import CompiledProgram
from autopar.runtime.interpreter import Shards
from autopar.runtime.module import _copies_if
from tests.unit.runtime.recorder import Recorder

aten = torch.ops.aten


class Product(CompiledProgram):
    """y = w x, eagerly."""

    def __init__(self) -> None:
        port = Port(Ref("x"), TensorMeta((2,), torch.float32), ((2,),), ())
        body = (Compute("y", aten.mul.Tensor, (Ref("w"), Ref("x")), {}, "y"),)
        weight = Port(Ref("w"), port.meta, port.dims, ())
        program = LocalProgram(
            {"w": weight, "x": port}, body, {"y": Port(Ref("y"), port.meta, port.dims, ())}, {}
        )
        super().__init__(program, coordinates=(), groups=(), device=torch.device("cpu"))

    def _compile(self, values: Sequence[Tensor]) -> CompiledModule:
        self._strides = [value.stride() for value in values]
        self.num_operators = 1
        self._compiled = CompiledModule(lambda values: [values[0] * values[1]], ())
        return self._compiled


def played(program: CapturedProgram, weight: Tensor, steps: int) -> list[Tensor]:
    found = []
    for step in range(steps):
        weight += 1
        x = torch.full((2,), float(step + 1))
        (result,) = program({"w": [weight], "x": [x]})["y"]
        assert torch.equal(result, weight * x)
        found.append(result)
    return found


def test_it_reads_new_inputs_and_lends_its_results() -> None:
    recorder, weight = Recorder(), torch.ones(2)
    program = CapturedProgram(Product(), staying={"w"}, seconds=None, recorder=recorder)
    results = played(program, weight, 2)
    assert not program.lends and recorder.replays == 0
    results += played(program, weight, 3)
    assert program.lends and recorder.replays == 3
    assert len({r.data_ptr() for r in results[2:]}) == 1
    other = copy.deepcopy(weight)  # moved: copied to where it was
    played(program, other, 1)
    program.release()
    assert recorder.forgotten and not program.lends
    played(program, other, 1)
    assert recorder.replays == 4


class SameTwice(Product):
    """y, under two names."""

    def __call__(self, inputs: MutableMapping[str, Shards]) -> Results:
        (result,) = super().__call__(inputs)["y"]
        return {"y": [result], "z": [result]}


def test_each_result_has_memory_of_its_own() -> None:
    """An optimizer may scale them in place."""
    program = CapturedProgram(SameTwice(), staying={"w"}, seconds=None, recorder=Recorder())
    for _ in range(4):
        results = program({"w": [torch.ones(2)], "x": [torch.ones(2)]})
    (y,), (z,) = results["y"], results["z"]
    assert y.data_ptr() != z.data_ptr() and torch.equal(y, z)


@pytest.mark.parametrize(
    ("seconds", "captured", "copies"),
    [
        (0.9 * SHORT_S, True, False),
        (1.1 * SHORT_S, True, True),
        (0.9 * LAUNCH_BOUND_S, True, True),
        (1.1 * LAUNCH_BOUND_S, False, True),
    ],
)
def test_short_kernels_are_captured_and_the_shortest_make_no_copies(
    seconds: float, captured: bool, copies: bool
) -> None:
    program = CapturedProgram(Product(), staying={"w"}, seconds=seconds, recorder=Recorder())
    played(program, torch.ones(2), 3)
    assert program.lends is captured
    assert _copies_if(True, seconds)(program._program.num_operators) is copies
    assert _copies_if(False, seconds)(program._program.num_operators)


def test_what_cannot_be_captured_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(play: Callable[[], Results]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    program = CapturedProgram(Product(), staying={"w"}, seconds=None, recorder=fail)
    played(program, torch.ones(2), 5)
    assert not program.lends
    assert [r.message for r in caplog.records] == [
        "the step runs kernel by kernel, as it could not be captured as a CUDA graph: RuntimeError:"
        " operation not permitted when stream is capturing. Pass cuda_graph=False to leave that"
        " out."
    ]
