"""Gradients of norms, whose kernel leaves parts of its sums over rows, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.inductor import compile_module
from autopar.compile.passes import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def backward(dy: Tensor, x: Tensor, rate: Tensor, weight: Tensor, stream: Tensor) -> list[Tensor]:
    """Of a norm without a mean, and for a bias; rate [N, 1]."""
    wide, normal = dy.to(rate.dtype), x.to(rate.dtype) * rate
    scaled = wide * weight
    dx = rate * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    gradients = (wide * normal).sum(0), wide.sum(0)
    return [dx.to(dy.dtype) + stream, *(g.to(weight.dtype) for g in gradients)]


@pytest.mark.parametrize(("rows", "columns"), [(8192, 2048), (8192, 768), (16384, 4096)])
@pytest.mark.parametrize("narrow", [False, True])
def test_sums_of_norms_are_one_kernel(rows: int, columns: int, narrow: bool) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    dtype = torch.bfloat16 if narrow else torch.float32
    dy, x, stream = (values(rows, columns).to(torch.bfloat16) for _ in range(3))
    inputs = [dy, x, values(rows, 1).abs(), values(columns).to(dtype), stream]
    with torch.no_grad():
        table = select_decomp_table()
        module = make_fx(backward, decomposition_table=table, tracing_mode="fake")(*inputs)

    def play() -> list[Tensor]:
        with config.patch(force_disable_caches=True):
            return list(compile_module(prepare(module, [])).call(list(inputs)))

    made, codes = run_and_get_code(play)
    assert sum(code.count("autopar.split_sums(") for code in codes) == 1
    assert not any(".sum(dim=0)" in code for code in codes)
    wants = backward(dy, x, inputs[2].double(), inputs[3].double(), stream)
    for got, want in zip(made[1:], wants[1:], strict=True):
        assert got.dtype is dtype
        scale = want.abs().max().item()
        torch.testing.assert_close(
            got.double(), want, rtol=0.0, atol=scale * (4e-3 if narrow else 1e-5)
        )
