"""Statistics of channels by sums of one pass are those of two passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.kernels import decompositions
from autopar.compile.moments import var_mean
from tests.unit.compile.inductor_memory import moved_bytes

DIMS = [0, 2, 3]


def batch(mean: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(8, 6, 5, 7, generator=generator, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def traced(x: Tensor) -> fx.GraphModule:
    def play(x: Tensor) -> list[Tensor]:
        return list(torch.var_mean(x.float(), DIMS, correction=0))

    module: fx.GraphModule = make_fx(
        play, decomposition_table=decompositions([]), tracing_mode="fake"
    )(x)
    return module


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("mean", [0.0, -3.0, 1e4])
def test_values_are_exact_whatever_the_mean(mean: float, keepdim: bool, correction: int) -> None:
    x = batch(mean)
    got = var_mean(x, DIMS, correction=correction, keepdim=keepdim)
    want = torch.var_mean(x.double(), DIMS, correction=correction, keepdim=keepdim)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=2e-6, atol=1e-6)


def test_equal_elements_have_no_variance() -> None:
    var, mean = var_mean(torch.full((4, 2, 3, 3), 0.1), DIMS, correction=0)
    assert var.tolist() == [0.0, 0.0]
    assert mean.tolist() == [pytest.approx(0.1)] * 2


def test_other_calls_are_left() -> None:
    x = batch(0.0)
    assert var_mean(x, [2, 3], correction=0) is NotImplemented
    assert var_mean(x, None) is NotImplemented
    assert var_mean(x.bfloat16(), DIMS, correction=0) is NotImplemented
    assert var_mean(x[:1, :, :1, :1], DIMS) is NotImplemented  # no variance of one element


def test_the_batch_is_read_once() -> None:
    x = batch(0.0, torch.bfloat16)
    module = traced(x)
    want = torch.var_mean(x.float(), DIMS, correction=0)
    torch.testing.assert_close(module(x), list(want), rtol=1e-5, atol=1e-6)
    assert moved_bytes(module) < 1.5 * x.nbytes
