"""Two CUDA devices through NCCL against the virtual run on the CPU."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from autopar.lowering.lower import lower_plan
from autopar.runtime.launch import run_processes
from autopar.runtime.simulated import VirtualRun
from tests.integration import workers
from tests.unit.runtime.reference import worst_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


CASES = {
    "gpt2, one stage": ("gpt2", [(2,)]),
    "gpt2, two stages": ("gpt2", [(1,), (1,)]),
    "wide_resnet, one stage": ("wide_resnet", [(2,)]),
    "wide_resnet, two stages": ("wide_resnet", [(1,), (1,)]),
    "sizes that two does not divide": ("uneven gpt2", [(2,)]),
    "rows go to their experts": ("mixtral", [(2,)], "", {"experts": "x"}),
    "queries are shared": ("llama", [(2,)], "", {"sdpa": "s"}),
    "bfloat16": ("gpt2", [(2,)], "bf16"),
    "bfloat16, experts": ("mixtral", [(2,)], "bf16", {"experts": "x"}),
}
# bfloat16 on two kinds of device: eight bits, through a few layers.
TOLERANCES = {"": (1e-10, 1e-8), "bf16": (2e-2, 0.25)}


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_virtual_run(name: str) -> None:
    case, plan = workers.random_case(*CASES[name])
    run = VirtualRun(lower_plan(case.graph, plan), case.graph, case.parameters, case.buffers)
    want = run.step(case.leaves, workers.SEED)
    ranks = run_processes(
        workers.step_of, 2, *CASES[name], device_type="cuda", timeout=timedelta(seconds=120)
    )
    precision = CASES[name][2] if len(CASES[name]) > 2 else ""
    loss_tolerance, tolerance = TOLERANCES[precision]
    merged: dict[str, torch.Tensor] = {}
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], want.loss, rtol=loss_tolerance, atol=0)
        merged.update(rank["gradients"])
    error, worst = worst_error(merged, want.gradients)
    assert error <= tolerance, worst
