"""Parameters that rest on the hosts of CUDA devices against the virtual run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.lowering.lower import lower_plan
from autopar.runtime.launch import run_processes
from autopar.runtime.simulated import VirtualRun
from tests.integration import workers
from tests.unit.runtime.reference import worst_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def test_one_device(tmp_path: Path) -> None:
    check([(1,)], [workers.on_hosts(None, [(1,)], str(tmp_path))])


@needs_two
@pytest.mark.parametrize("meshes", [[(2,)], [(1,), (1,)]], ids=str)
def test_two_devices(meshes: Sequence[tuple[int, ...]], tmp_path: Path) -> None:
    check(
        meshes,
        run_processes(
            workers.on_hosts,
            2,
            meshes,
            str(tmp_path),
            device_type="cuda",
            timeout=timedelta(seconds=120),
        ),
    )


def check(meshes: Sequence[tuple[int, ...]], ranks: Sequence[Mapping[str, Any]]) -> None:
    case, plan = workers.make_case("gpt2" + workers.ON_HOSTS, meshes)
    run = VirtualRun(lower_plan(case.graph, plan), case.graph, case.parameters, case.buffers)
    run.attach(lambda shards: torch.optim.AdamW(shards, lr=workers.RATE))
    want = run.step(case.leaves, workers.SEED)
    merged: dict[str, dict[str, torch.Tensor]] = {"gradients": {}, "parameters": {}}
    for rank in ranks:
        assert torch.allclose(rank["loss"], want.loss, rtol=1e-8)
        assert rank["on_host"]
        for kind, tensors in merged.items():
            tensors.update(rank[kind])
    error, worst = worst_error(merged["gradients"], want.gradients)
    assert error <= 1e-8, worst
    norm = torch.nn.utils.get_total_norm(list(want.gradients.values()))
    for rank in ranks:
        assert torch.allclose(rank["norm"], norm, rtol=1e-8)
    run.scale_gradients(min(1.0, float(workers.MAX_NORM / (norm + 1e-6))))
    run.update()
    error, worst = worst_error(merged["parameters"], run.parameters())
    assert error <= 1e-6, worst  # Adam divides zero-but-for-rounding by itself
    second = run.step(case.leaves, workers.SEED + 1)
    for rank in ranks:
        assert torch.allclose(rank["second"], second.loss, rtol=1e-6)
