"""Sums over rows that are made by the kernel that writes what they sum, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor import config, metrics
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.inductor import compile_module
from autopar.compile.passes import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Play = Callable[..., list[Tensor]]

aten = torch.ops.aten
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# batch, sequence, heads, their size: blocks of 256, 256 and 32 rows
SIZES = [(8, 1024, 16, 128), (3, 1280, 24, 64), (3, 416, 12, 96)]


def values(*shape: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(len(shape))
    return torch.randn(shape, device="cuda", generator=generator)


def packed(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of queries, keys and values as one matrix, of a bias and of a layer's input."""
    batch, heads, sequence, width = q.shape
    rows = [g.transpose(1, 2).reshape(batch, sequence, -1) for g in (q, k, v)]
    dy = torch.cat(rows, -1).view(batch * sequence, 3 * heads * width)
    return [dy, dy.sum(0, keepdim=True).view(-1), dy @ weight]


def bent(dz: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """The same behind a GELU."""
    dy = aten.gelu_backward(dz, y, approximate="tanh").view(-1, y.shape[-1])
    return [dy, dy.sum(0), dy @ weight]


def compiled(play: Play, inputs: list[Tensor]) -> tuple[list[Tensor], int]:
    """Results, and the number of Inductor's kernels."""
    with torch.no_grad():
        module = make_fx(play, decomposition_table=select_decomp_table(), tracing_mode="fake")(
            *inputs
        )
    metrics.reset()
    with config.patch(force_disable_caches=True):
        call = compile_module(prepare(module, [])).call
    return list(call(list(inputs))), metrics.generated_kernel_count


def check(play: Play, inputs: list[Tensor]) -> None:
    (dy, total, product), kernels = compiled(play, inputs)
    want_dy, _, want_product = play(*(x.double() for x in inputs))
    eps = torch.finfo(dy.dtype).eps
    torch.testing.assert_close(dy.double(), want_dy, rtol=eps, atol=1e-4)
    torch.testing.assert_close(total.double(), dy.double().sum(0), rtol=max(eps, 1e-5), atol=1e-3)
    error = max(4 * eps, 1e-5) * want_product.abs().max().item()
    torch.testing.assert_close(product.double(), want_product, rtol=0.0, atol=error)
    assert kernels == 2  # the second sums over blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_concatenations(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, sequence, heads, width = size
    grads = [values(batch, sequence, heads, width).to(dtype).transpose(1, 2) * s for s in (1, 2, 3)]
    weight = values(3 * heads * width, 64).to(dtype)
    check(packed, [*grads, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_pointwise_operators(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, sequence, heads, width = size
    grad, y = (values(batch, sequence, 4 * heads * width).to(dtype) * s for s in (1, 2))
    weight = values(4 * heads * width, 64).to(dtype)
    check(bent, [grad, y, weight])
