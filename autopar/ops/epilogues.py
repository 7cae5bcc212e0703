"""GELU (by its tanh formula) and its gradient in the kernel of the product that they follow.

    linear_gelu(a [m, k], b [k, n], bias [n])       x = a @ b + bias;  y = gelu(x);  -> y, x: [m, n]
    gelu_gradient(a [m, k], b [k, n], x [.., n])    (a @ b) gelu'(x)                 -> [.., n]

A product that waits for its multiplications anyway writes x beside y, or reads x, while it
multiplies: what a GELU on its own would read and write is 4 bytes per element forward, 6 backward.
Sums are not rounded before the function, which is exact to the rounding of its result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autopar.ops import cublaslt
from autopar.ops.cublaslt import Epilogue, Problem
from autopar.ops.library import LIBRARY, define
from autopar.ops.products import product_flops

aten, own = torch.ops.aten, torch.ops.autopar

# All of one type. choice: the number of a kernel, of `cublaslt.num_kernels`.
define("linear_gelu(Tensor a, Tensor b, Tensor bias, int choice) -> (Tensor y, Tensor x)")
define("gelu_gradient(Tensor a, Tensor b, Tensor x, int choice) -> Tensor")

_GELU = Epilogue.GELU | Epilogue.AUX | Epilogue.BIAS
_GRADIENT = Epilogue.GELU_GRADIENT | Epilogue.AUX
_LEAST_DEPTH = 1024
"""k from which a gradient's epilogue is worth the pass that sums its result over rows for a bias.
On an H100 it takes 0.01 ms off the MLP of a GPT's block, 0.47 ms at k = 768, and 0.14 off 5.3 ms at
2048; the pass would take 0.02 and 0.09.
"""


def linear_gelu(a: Tensor, b: Tensor, bias: Tensor, _choice: int) -> tuple[Tensor, Tensor]:
    """Plain ATen body of `autopar::linear_gelu`."""
    x = aten.add.Tensor(aten.mm.default(a, b), bias)
    return aten.gelu.default(x, approximate="tanh"), x


def gelu_gradient(a: Tensor, b: Tensor, x: Tensor, _choice: int) -> Tensor:
    """Plain ATen body of `autopar::gelu_gradient`."""
    grad = aten.reshape.default(aten.mm.default(a, b), x.shape)
    made: Tensor = aten.gelu_backward.default(grad, x, approximate="tanh")
    return made


def linear_gelu_problem(a: Tensor, b: Tensor, bias: Tensor) -> Problem | None:
    """What one kernel solves, if one does."""
    is_row = bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.dtype is a.dtype
    return cublaslt.problem_of(a, b, _GELU) if is_row and a.dtype is torch.bfloat16 else None


def gelu_gradient_problem(a: Tensor, b: Tensor, x: Tensor) -> Problem | None:
    """What one kernel solves, if one does and that is faster."""
    is_alike = x.dtype is a.dtype is torch.bfloat16 and x.is_contiguous()
    is_alike &= x.numel() == a.shape[0] * b.shape[1] and x.shape[-1:] == b.shape[1:]
    if not is_alike or a.shape[1] < _LEAST_DEPTH:
        return None
    return cublaslt.problem_of(a, b, _GRADIENT)


def _linear_gelu_cuda(a: Tensor, b: Tensor, bias: Tensor, choice: int) -> tuple[Tensor, Tensor]:
    if linear_gelu_problem(a, b, bias) is None:
        return linear_gelu(a, b, bias, choice)
    x = a.new_empty(a.shape[0], b.shape[1])
    return cublaslt.product(a, b, _GELU, bias=bias, aux=x, choice=choice), x


def _gelu_gradient_cuda(a: Tensor, b: Tensor, x: Tensor, choice: int) -> Tensor:
    if gelu_gradient_problem(a, b, x) is None:
        return gelu_gradient(a, b, x, choice)
    aux = x.view(a.shape[0], b.shape[1])
    return cublaslt.product(a, b, _GRADIENT, aux=aux, choice=choice).view(x.shape)


def _fake(a: Tensor, b: Tensor, bias: Tensor, choice: int) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], b.shape[1])
    return a.new_empty(shape), a.new_empty(shape)


def _fake_gradient(a: Tensor, b: Tensor, x: Tensor, choice: int) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl("linear_gelu", linear_gelu, "CPU")
LIBRARY.impl("linear_gelu", _linear_gelu_cuda, "CUDA")
LIBRARY.impl("gelu_gradient", gelu_gradient, "CPU")
LIBRARY.impl("gelu_gradient", _gelu_gradient_cuda, "CUDA")
torch.library.register_fake("autopar::linear_gelu", _fake, lib=LIBRARY)
torch.library.register_fake("autopar::gelu_gradient", _fake_gradient, lib=LIBRARY)

for _operator in (own.linear_gelu, own.gelu_gradient):
    register_flop_formula(_operator)(product_flops)
