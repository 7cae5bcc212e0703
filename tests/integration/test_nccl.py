"""Two CUDA devices through NCCL against the virtual run on the CPU."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from autopar.graph.precision import in_float64
from autopar.lowering.lower import lower_plan
from autopar.plan import ParallelPlan
from autopar.runtime.launch import run_processes
from autopar.runtime.simulated import VirtualRun
from autopar.schedule import ScheduleKind
from autopar.verify import NARROW_SLACK, computes_narrow
from tests.integration import workers
from tests.oracles import widened
from tests.unit.runtime.reference import Case, worst_error

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
    "stages take turns": ("t5", [(1,)] * 4, "", None, ScheduleKind.INTERLEAVED, 2),
    "skip connections": ("unet", [(1,)] * 6, "", None, ScheduleKind.INTERLEAVED, 2),
    "transfers inside a worker": ("gpt2", [(2,)] * 2, "", None, ScheduleKind.INTERLEAVED, 1),
    "backward in two": ("gpt2", [(1,), (1,)], "", None, ScheduleKind.ZB_H1),
    "bfloat16": ("gpt2", [(2,)], "bf16"),
    "bfloat16, experts": ("mixtral", [(2,)], "bf16", {"experts": "x"}),
}


# In bfloat16 a router's choice flips at a near tie, and with it a token's whole contribution.
ONLY_THE_LOSS = {"bfloat16, experts"}


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_virtual_run(name: str) -> None:
    """In bfloat16 both differ from the float64 step by their rounding: the GPUs may not by more
    than NARROW_SLACK times as much."""
    case, plan = workers.random_case(*CASES[name])
    ranks = run_processes(
        workers.step_of, 2, *CASES[name], device_type="cuda", timeout=timedelta(seconds=120)
    )
    merged: dict[str, torch.Tensor] = {"loss": ranks[0]["loss"]}
    for rank in ranks:
        assert torch.equal(rank["loss"], merged["loss"])
        merged.update(rank["gradients"])
    want = virtual_step(case, plan)
    limit = 1e-8
    if computes_narrow(case.graph):
        graph = in_float64(case.graph)
        exact = virtual_step(
            replace(
                case,
                graph=graph,
                parameters=widened(case.parameters),
                buffers=widened(case.buffers),
            ),
            replace(plan, graph=graph.fingerprint()),
        )
        limit = NARROW_SLACK * worst_error(want, exact)[0]
        want = exact
    if name in ONLY_THE_LOSS:
        merged, want = ({"loss": values["loss"]} for values in (merged, want))
        limit = torch.finfo(torch.bfloat16).eps
    error, worst = worst_error(merged, want)
    assert error <= limit, worst


def virtual_step(case: Case, plan: ParallelPlan) -> dict[str, torch.Tensor]:
    """Gradients by owner, and the loss."""
    run = VirtualRun(lower_plan(case.graph, plan), case.graph, case.parameters, case.buffers)
    result = run.step(case.leaves, workers.SEED)
    return {"loss": result.loss, **result.gradients}
