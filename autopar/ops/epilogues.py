"""GELU (by its tanh formula), its gradient and sums in the kernel of the product that they follow.

    linear_gelu(a [m, k], b [k, n], bias [n])       x = a @ b + bias;  y = gelu(x);  -> y, x: [m, n]
    gelu_gradient(a [m, k], b [k, n], x [.., n])    (a @ b) gelu'(x)                 -> [.., n]
    linear_add(a [m, k], b [k, n], bias [n], x [.., n])     x + a @ b + bias         -> [.., n]

A product that waits for its multiplications anyway writes x beside y, or reads x, while it
multiplies: what a GELU on its own would read and write is 4 bytes per element forward, 6 backward,
a sum 6. Sums are not rounded before the function, which is exact to the rounding of its result.
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
define("linear_add(Tensor a, Tensor b, Tensor? bias, Tensor x, int choice) -> Tensor")

_GELU = Epilogue.GELU | Epilogue.AUX | Epilogue.BIAS
_GRADIENT = Epilogue.GELU_GRADIENT | Epilogue.AUX
_LEAST_DEPTH = 1024
"""k from which a gradient's epilogue is worth the pass that sums its result over rows for a bias.
On an H100 it takes 0.01 ms off the MLP of a GPT's block, 0.47 ms at k = 768, and 0.14 off 5.3 ms at
2048; the pass would take 0.02 and 0.09.
"""
_LEAST_DEPTH_OF_SUM = 2048
"""k from which a sum in the kernel is worth it. On an H100, in turns under the cap of power, the
product of 16,384 x k x 2048 with a bias takes 0.03 ms longer with it at k = 2048, and no longer at
8192; a pass over memory takes 0.02 ms to read the product, and as long to write the sum.
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


def linear_add(a: Tensor, b: Tensor, bias: Tensor | None, x: Tensor, _choice: int) -> Tensor:
    """Plain ATen body of `autopar::linear_add`."""
    product = aten.mm.default(a, b)
    product = product if bias is None else aten.add.Tensor(product, bias)
    made: Tensor = aten.add.Tensor(x, aten.reshape.default(product, x.shape))
    return made


def linear_gelu_problem(a: Tensor, b: Tensor, bias: Tensor) -> Problem | None:
    """What one kernel solves, if one does."""
    is_able = a.dtype is torch.bfloat16 and _is_row(bias, a, b)
    return cublaslt.problem_of(a, b, _GELU) if is_able else None


def gelu_gradient_problem(a: Tensor, b: Tensor, x: Tensor) -> Problem | None:
    """What one kernel solves, if one does and that is faster."""
    if not _is_like_product(x, a, b) or a.shape[1] < _LEAST_DEPTH:
        return None
    return cublaslt.problem_of(a, b, _GRADIENT)


def linear_add_problem(a: Tensor, b: Tensor, bias: Tensor | None, x: Tensor) -> Problem | None:
    """What one kernel solves, if one does and that is faster."""
    has_bias = bias is not None
    if bias is not None and not _is_row(bias, a, b):
        return None
    if not _is_like_product(x, a, b) or a.shape[1] < _LEAST_DEPTH_OF_SUM:
        return None
    return cublaslt.problem_of(a, b, Epilogue.BIAS if has_bias else Epilogue.NONE, adds=True)


def _is_row(bias: Tensor, a: Tensor, b: Tensor) -> bool:
    return bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.dtype is a.dtype


def _is_like_product(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether it lies in memory as a @ b does, of bfloat16."""
    is_alike = x.dtype is a.dtype is torch.bfloat16 and x.is_contiguous()
    return is_alike and x.numel() == a.shape[0] * b.shape[1] and x.shape[-1:] == b.shape[1:]


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


def _linear_add_cuda(a: Tensor, b: Tensor, bias: Tensor | None, x: Tensor, choice: int) -> Tensor:
    problem = linear_add_problem(a, b, bias, x)
    if problem is None:
        return linear_add(a, b, bias, x, choice)
    c = x.view(a.shape[0], b.shape[1])
    made = cublaslt.product(a, b, problem.epilogue, bias=bias, c=c, choice=choice)
    return made.view(x.shape)


def _fake(a: Tensor, b: Tensor, bias: Tensor, choice: int) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], b.shape[1])
    return a.new_empty(shape), a.new_empty(shape)


def _fake_gradient(a: Tensor, b: Tensor, x: Tensor, choice: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_sum(a: Tensor, b: Tensor, bias: Tensor | None, x: Tensor, choice: int) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl("linear_gelu", linear_gelu, "CPU")
LIBRARY.impl("linear_gelu", _linear_gelu_cuda, "CUDA")
LIBRARY.impl("gelu_gradient", gelu_gradient, "CPU")
LIBRARY.impl("gelu_gradient", _gelu_gradient_cuda, "CUDA")
LIBRARY.impl("linear_add", linear_add, "CPU")
LIBRARY.impl("linear_add", _linear_add_cuda, "CUDA")
torch.library.register_fake("autopar::linear_gelu", _fake, lib=LIBRARY)
torch.library.register_fake("autopar::gelu_gradient", _fake_gradient, lib=LIBRARY)
torch.library.register_fake("autopar::linear_add", _fake_sum, lib=LIBRARY)

for _operator in (own.linear_gelu, own.gelu_gradient, own.linear_add):
    register_flop_formula(_operator)(product_flops)
