"""autopar::cross_entropy: its value and gradient in every type, and what a compiler makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from autopar.compile.kernels import decompositions

ROWS, CLASSES = 12, 40
IGNORED = -100
own = torch.ops.autopar


def scores(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[3] = IGNORED
    return (8 * torch.randn(ROWS, CLASSES, generator=generator)).to(dtype), target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_rounds_nothing_but_the_gradient(dtype: torch.dtype) -> None:
    x, target = scores(dtype)
    exact = x.double().requires_grad_()
    want = functional.cross_entropy(exact, target, reduction="sum")
    (gradient,) = torch.autograd.grad(want, exact)
    x.requires_grad_()
    loss, rows, lse = own.cross_entropy(x, target, IGNORED)
    (got,) = torch.autograd.grad(loss, x)
    wide = torch.promote_types(dtype, torch.float32)
    assert (loss.dtype, rows.dtype, lse.dtype, got.dtype) == (wide, wide, wide, dtype)
    assert float(rows) == ROWS - 1
    digits = 1e-14 if wide is torch.float64 else 1e-6
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=digits, atol=0)
    torch.testing.assert_close(got, gradient.to(dtype))
    assert not got[3].any()


def test_a_shard_counts_from_its_first_class() -> None:
    x, target = scores(torch.float64)
    grad, lse = torch.tensor(0.5, dtype=torch.float64), x.logsumexp(1)
    whole = own.cross_entropy_backward(grad, x, target, lse, IGNORED, 0)
    half = CLASSES // 2
    right = own.cross_entropy_backward(grad, x[:, half:].contiguous(), target, lse, IGNORED, half)
    assert torch.equal(right, whole[:, half:])


def test_registration() -> None:
    x, target = scores(torch.float32)
    torch.library.opcheck(own.cross_entropy.default, (x.requires_grad_(), target, IGNORED))


def test_a_compiler_sees_one_table_and_makes_one_gradient() -> None:
    """Everything between is pointwise or a sum over a row: it fuses, and nothing wide is kept."""

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, rows, lse = own.cross_entropy(x, target, IGNORED)
        return loss, own.cross_entropy_backward(1 / rows, x, target, lse, IGNORED, 0)

    x, target = scores(torch.bfloat16)
    graph: fx.GraphModule = make_fx(
        step, decomposition_table=decompositions([]), tracing_mode="fake"
    )(x, target)
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    from autopar.compile.inductor import compile_module

    with config.patch(fx_graph_cache=False):
        (loss, gradient), (code,) = run_and_get_code(
            lambda: compile_module(graph).call([x.clone(), target])
        )
    want, want_gradient = step(x, target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient)
    tables = [line for line in code.splitlines() if f"({ROWS}, {CLASSES})" in line and "=" in line]
    assert [line for line in tables if "empty_strided" in line and "float32" in line] == []
