"""GELU and its gradient as one operator with the product before them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from autopar.compile.overlap import flop_registry
from autopar.ops.cublaslt import Epilogue, num_kernels, problem_of
from autopar.ops.epilogues import gelu_gradient_problem, linear_add_problem, linear_gelu_problem
from tests.devices import DEVICES

own = torch.ops.autopar
NARROW = [torch.bfloat16, torch.float16]
M, K, N = 48, 1024, 80


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str, by_columns: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    shape = (columns, rows) if by_columns else (rows, columns)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    return x.t() if by_columns else x


def assert_near(got: Tensor, want: Tensor, scale: Tensor) -> None:
    """Within a rounding of the result and of what its function takes, whose slope is about 1;
    and of the sums, which are float32."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - want).abs()
    assert bool((error <= eps * (want.abs() + scale) + 1e-5).all()), error.max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("lies", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("first", [0, 3])
def test_a_linear_layer(
    device: str, dtype: torch.dtype, lies: tuple[bool, bool], first: int
) -> None:
    """first: of a bias among others, so that it may not be aligned."""
    a, b = matrix(M, K, dtype, device, lies[0]), matrix(K, N, dtype, device, lies[1]) / K**0.5
    biases = matrix(1, first + N, dtype, device, False)
    bias = biases[0, first:]
    y, x = own.linear_gelu(a, b, bias, 0)
    assert y.is_contiguous() and x.is_contiguous() and y.dtype is x.dtype is dtype
    want = a.double() @ b.double() + bias.double()
    assert_near(x, want, want.abs() + 1)
    assert_near(y, gelu(want, approximate="tanh"), want.abs() + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("lies", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(M, N), (2, M // 2, N)])
def test_a_gradient(
    device: str, dtype: torch.dtype, lies: tuple[bool, bool], shape: tuple[int, ...]
) -> None:
    a, b = matrix(M, K, dtype, device, lies[0]), matrix(K, N, dtype, device, lies[1]) / K**0.5
    x = matrix(M, N, dtype, device, False).view(shape)
    grad = own.gelu_gradient(a, b, x, 0)
    assert grad.is_contiguous() and grad.shape == shape and grad.dtype is dtype
    product = a.double() @ b.double()
    wide = x.double().requires_grad_()
    gelu(wide, approximate="tanh").backward(product.view(shape))
    assert wide.grad is not None
    assert_near(grad, wide.grad, product.abs().view(shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("lies", [(False, False), (False, True)])
@pytest.mark.parametrize("depth", [K, 2 * K])
@pytest.mark.parametrize("shape", [(M, N), (2, M // 2, N)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sum(
    device: str,
    dtype: torch.dtype,
    lies: tuple[bool, bool],
    depth: int,
    shape: tuple[int, ...],
    has_bias: bool,
) -> None:
    a = matrix(M, depth, dtype, device, lies[0])
    b = matrix(depth, N, dtype, device, lies[1]) / depth**0.5
    x = matrix(M, N, dtype, device, False).view(shape)
    bias = matrix(1, N, dtype, device, False)[0] if has_bias else None
    before = x.clone()
    total = own.linear_add(a, b, bias, x, 0)
    assert total.is_contiguous() and total.shape == shape and total.dtype is dtype
    terms = [a.double() @ b.double(), x.double().view(M, N)]
    terms += [] if bias is None else [bias.double().expand(M, N)]
    scale = torch.stack(terms).abs().sum(0)
    assert_near(total, torch.stack(terms).sum(0).view(shape), scale.view(shape))
    assert torch.equal(x, before)


def test_a_cpu_has_no_kernel() -> None:
    a, b = matrix(M, K, torch.bfloat16, "cpu", False), matrix(K, N, torch.bfloat16, "cpu", True)
    assert linear_gelu_problem(a, b, a.new_empty(N)) is None
    assert gelu_gradient_problem(a, b, a.new_empty(M, N)) is None
    assert linear_add_problem(a, b, None, a.new_empty(M, N)) is None


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


@pytest.mark.gpu
@on_hopper
def test_who_has_a_kernel() -> None:
    a, b = matrix(M, K, torch.bfloat16, "cuda", False), matrix(K, N, torch.bfloat16, "cuda", True)
    bias, x = a.new_empty(N), a.new_empty(2, M // 2, N)
    assert linear_gelu_problem(a, b, bias) and gelu_gradient_problem(a, b, x)
    assert linear_gelu_problem(a.float(), b.float(), bias.float()) is None
    assert linear_gelu_problem(a.half(), b.half(), bias.half()) is None  # never measured
    assert linear_gelu_problem(a, b[:, :-1], bias[:-1]) is None  # unaligned rows of the result
    assert linear_gelu_problem(a[:, ::2], b[::2], bias) is None
    assert linear_gelu_problem(a, b, bias.float()) is None
    assert linear_gelu_problem(a, b, bias[:1]) is None
    assert gelu_gradient_problem(a[:, :512], b[:512], x) is None  # too little work
    assert gelu_gradient_problem(a, b, x.transpose(0, 1)) is None
    a, b = matrix(M, 2 * K, a.dtype, "cuda", False), matrix(2 * K, N, b.dtype, "cuda", True)
    for is_row in (bias, None):
        assert linear_add_problem(a, b, is_row, x)
        assert linear_add_problem(a, b, is_row, x.transpose(0, 1)) is None
        assert linear_add_problem(a, b, is_row, x[:1]) is None
    assert linear_add_problem(a, b, bias.float(), x) is None
    assert linear_add_problem(a[:, :K], b[:K], bias, x) is None  # too little work


@pytest.mark.gpu
@on_hopper
def test_addresses_need_not_be_aligned() -> None:
    """Such as parts of one buffer; rows keep their distance in a copy."""
    a, b, x = (torch.randn(rows, 4 * K, device="cuda").bfloat16() for rows in (M, 2 * K, M))
    odd = a[:, 3 : 2 * K + 3], b[:, 5 : N + 5], x.flatten()[7 : M * N + 7].view(M, N)
    even = [part.contiguous() for part in odd]
    for operator in (
        own.gelu_gradient,
        lambda a, b, x, choice: own.linear_gelu(a, b, x[0], choice)[0],
        lambda a, b, x, choice: own.linear_add(a, b, x[0], x, choice),
    ):
        torch.testing.assert_close(operator(*odd, 0), operator(*even, 0), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_multiplies(dtype: torch.dtype) -> None:
    a, b = matrix(M, K, torch.bfloat16, "cuda", False), matrix(K, N, torch.bfloat16, "cuda", True)
    problem = problem_of(a, b, Epilogue.NONE, dtype)
    assert problem is not None
    kernels = num_kernels(problem)
    assert kernels > 1
    want = (a.double() @ b.double()).to(dtype)
    for kernel in range(kernels):
        product = own.product(a, b, dtype, kernel)
        assert product.dtype is dtype and product.is_contiguous()
        torch.testing.assert_close(product, want, rtol=1e-2, atol=1e-3 * K**0.5)


def test_fakes_and_operators_agree() -> None:
    a, b = matrix(M, K, torch.float32, "cpu", False), matrix(K, N, torch.float32, "cpu", True)
    for operator, *rest in (
        (own.linear_gelu, b[0]),
        (own.gelu_gradient, a[:, :N]),
        (own.linear_add, b[0], a[:, :N]),
        (own.linear_add, None, a[:, :N]),
    ):
        torch.library.opcheck(
            operator.default, (a, b, *rest, 0), test_utils=("test_schema", "test_faketensor")
        )
        assert flop_registry[operator](a, b, *rest, out_val=None) == 2 * M * K * N
