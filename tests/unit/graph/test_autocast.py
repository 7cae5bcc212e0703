"""Regions of autocast("cuda") on CPU tensors: CUDA's lists, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.graph.autocast import cuda_regions_on_cpu
from autopar.graph.capture import capture_graph

BF16, F32 = torch.bfloat16, torch.float32
NARROW, WIDE = torch.ones(4, 4, dtype=BF16), torch.ones(4, 4)
INDEX = torch.zeros(4, dtype=torch.int64)

# What CUDA's documentation says of each, for a bfloat16 operand unless a float32 one is given.
CALLS: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "matmul": (lambda: WIDE @ WIDE, BF16),
    "linear": (lambda: functional.linear(WIDE, WIDE), BF16),
    "mv": (lambda: WIDE.mv(WIDE[0]), BF16),
    "softmax": (lambda: NARROW.softmax(-1), F32),
    "log_softmax": (lambda: functional.log_softmax(NARROW, -1), F32),
    "softmax of a type": (lambda: NARROW.softmax(-1, dtype=BF16), BF16),
    "layer_norm": (lambda: functional.layer_norm(NARROW, (4,)), F32),
    "group_norm": (lambda: functional.group_norm(NARROW, 2), F32),
    "exp": (lambda: NARROW.exp(), F32),
    "pow": (lambda: NARROW.pow(2), F32),
    "rsqrt": (lambda: NARROW.rsqrt(), F32),
    "sum": (lambda: NARROW.sum(0), F32),
    "cumsum": (lambda: NARROW.cumsum(0), F32),
    "norm": (lambda: NARROW.norm(), F32),
    "cross_entropy": (lambda: functional.cross_entropy(NARROW, INDEX), F32),
    "mse_loss": (lambda: functional.mse_loss(NARROW, NARROW), F32),
    "mixed cat": (lambda: torch.cat([NARROW, WIDE]), F32),
    "mixed addcmul": (lambda: torch.addcmul(NARROW, NARROW, WIDE), F32),
    "narrow addcmul": (lambda: torch.addcmul(NARROW, NARROW, NARROW), BF16),
    "gelu": (lambda: functional.gelu(NARROW), BF16),
    "double": (lambda: WIDE.double().exp(), torch.float64),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_have_cudas_types(name: str) -> None:
    call, dtype = CALLS[name]
    with cuda_regions_on_cpu(), torch.autocast("cuda", dtype=BF16):
        assert call().dtype == dtype


@pytest.mark.parametrize("name", CALLS)
def test_regions_of_the_cpu_stay_its_own(name: str) -> None:
    call, _ = CALLS[name]
    with torch.autocast("cpu", dtype=BF16):
        own = call().dtype
    with cuda_regions_on_cpu():
        with torch.autocast("cpu", dtype=BF16):
            assert call().dtype == own
        with torch.autocast("cuda", dtype=BF16), torch.autocast("cuda", enabled=False):
            off = call().dtype
    assert off == call().dtype
    with torch.autocast("cpu", dtype=BF16):
        assert call().dtype == own  # nothing is left behind


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=BF16):
            mixed, _ = self.mix(x, x, x, need_weights=False)
            loss = functional.cross_entropy(self.out(self.norm(mixed)).flatten(0, 1), INDEX)
        return loss


def test_a_region_inside_a_model() -> None:
    """Matmuls and attention narrow, the norm and the loss wide, gradients as wide as parameters."""
    graph = capture_graph(Net(), torch.randn(1, 4, 8))
    metas = graph.metas()
    dtypes = {op.op_name: metas[op.refs[0]].dtype for op in graph.operators}
    assert dtypes["aten.mm.default"] == dtypes["autopar.sdpa.default"] == BF16
    assert dtypes["aten.native_layer_norm.default"] == F32
    assert dtypes["aten._log_softmax.default"] == F32
    assert {metas[out.ref].dtype for out in graph.outputs} == {F32}


def test_a_region_around_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has CUDA; without it torch switches such a region off itself."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device == "cuda")
    with cuda_regions_on_cpu():
        assert (WIDE @ WIDE).dtype == torch.get_autocast_dtype("cuda")
