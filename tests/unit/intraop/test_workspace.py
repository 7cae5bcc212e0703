"""Workspaces of the experts' kernels against what the kernels hold."""

from __future__ import annotations

import pytest
import torch

from autopar.graph.program import TensorMeta
from autopar.intraop.workspace import workspace_bytes
from autopar.ops import experts
from autopar.sharding.registry import rule_for
from autopar.sharding.strategy import strategies
from tests.oracles import Sample, make_sample
from tests.unit.intraop.measured import LiveBytes

TARGETS = (torch.ops.autopar.experts.default, torch.ops.autopar.experts_backward.default)
KERNELS = (experts._experts, experts._experts_backward)


def sample_of(backward: bool, width: int, dtype: torch.dtype) -> Sample:
    x, index = torch.randn(64, 32, dtype=dtype), torch.randint(8, (64, 2))
    weights = (torch.rand(64, 2, dtype=dtype), torch.randn(8, 2, width, 32, dtype=dtype))
    args = (x, index, *weights, torch.randn(8, 32, width, dtype=dtype), "silu", 0, 8)
    return make_sample(TARGETS[backward], (x, *args) if backward else args)


def predicted(sample: Sample, mesh: tuple[int, ...]) -> dict[str, float]:
    """By strategy."""
    metas = {
        ref: TensorMeta(tuple(t.shape), t.dtype)
        for ref, t in zip(sample.op.operands, sample.operands, strict=True)
    }
    choices = strategies(rule_for(sample.call), sample.call.operands, mesh)
    return {s.text: workspace_bytes(sample.op, s, metas, mesh) for s in choices}


@pytest.mark.parametrize("width", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_one_device(backward: bool, dtype: torch.dtype, width: int) -> None:
    sample = sample_of(backward, width, dtype)
    with LiveBytes() as live:
        KERNELS[backward](*sample.operands, "silu", 0, 8)
    results = sum(t.nbytes for t in sample.results if t is not None)
    held = live.peak - results * backward  # forward's result comes after its peak
    assert 0.75 < predicted(sample, (1,))["-"] / held < 1.5


def test_shards() -> None:
    """Tokens and experts share rows; the width shares the columns between the two matmuls."""
    forward = predicted(sample_of(False, 128, torch.float32), (4,))
    assert forward["t"] == forward["-"] / 4
    assert forward["-"] / 4 < forward["f"] < forward["-"]
    assert forward["t"] < forward["e"] < forward["x"] < forward["-"]
    assert predicted(sample_of(True, 128, torch.float32), (4,))["x"] > forward["x"]
