"""Two CUDA devices through NCCL against the virtual run on the CPU."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest
import torch

from autopar.lowering.lower import lower_plan
from autopar.runtime.launch import run_processes
from autopar.runtime.simulated import VirtualRun
from tests.integration import workers
from tests.plans import random_plan
from tests.unit.runtime.reference import worst_error, zoo_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("meshes", [[(2,)], [(1,), (1,)]], ids=["one stage", "two stages"])
@pytest.mark.parametrize("name", ["gpt2", "wide_resnet"])
def test_a_step_equals_the_virtual_run(name: str, meshes: list[tuple[int, ...]]) -> None:
    case = zoo_case(name)
    plan = random_plan(case.graph, meshes, random.Random(0))
    run = VirtualRun(lower_plan(case.graph, plan), case.graph, case.parameters, case.buffers)
    want = run.step(case.leaves, workers.SEED)
    ranks = run_processes(
        workers.step_of, 2, name, meshes, device_type="cuda", timeout=timedelta(seconds=120)
    )
    merged: dict[str, torch.Tensor] = {}
    for rank in ranks:
        assert torch.allclose(rank["loss"], want.loss, rtol=1e-10)
        merged.update(rank["gradients"])
    error, worst = worst_error(merged, want.gradients)
    assert error <= 1e-8, worst
