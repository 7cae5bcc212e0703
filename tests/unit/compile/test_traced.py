"""What a compiler is given computes what the interpreter does: tracing, joining and reordering."""

from __future__ import annotations

import random

import pytest

from autopar.compile.step import whole_step
from autopar.lowering.lower import lower_plan
from autopar.runtime.simulated import VirtualRun
from tests.plans import random_plan
from tests.unit.runtime.reference import worst_error, zoo_case

CASES = [
    ("gpt2", [(2,)], 1),  # a whole step, dropout
    ("dlrm", [(2, 2)], 1),
    ("llama", [(2,), (2,)], 2),  # stages: every program by itself
    ("wide_resnet", [(2,)], 1),  # buffers; shards with padding, whose ranks have different graphs
]


@pytest.mark.parametrize(("name", "meshes", "microbatches"), CASES)
def test_traced_programs_compute_what_the_interpreter_does(
    name: str, meshes: list[tuple[int, ...]], microbatches: int
) -> None:
    case = zoo_case(name, num_microbatches=microbatches)
    plan = random_plan(case.graph, meshes, random.Random(3), num_microbatches=microbatches)
    lowered = lower_plan(case.graph, plan)
    assert (whole_step(lowered, 0) is None) == (len(meshes) > 1)
    results = []
    for traced, copies in ((False, False), (True, False), (True, True)):
        run = VirtualRun(
            lowered,
            case.graph,
            case.parameters,
            case.buffers,
            traced=traced,
            peer_copies=copies,
        )
        run.step(case.leaves, 5)
        results.append(run.step(case.leaves, 6))
    want, *others = results
    for got in others:
        assert worst_error(got.gradients, want.gradients)[0] < 1e-10
        assert worst_error(got.buffers, want.buffers)[0] < 1e-10
        assert worst_error({"loss": got.loss}, {"loss": want.loss})[0] < 1e-12
