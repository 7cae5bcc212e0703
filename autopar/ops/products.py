"""`autopar::wide_product(a, b, dtype)`: a [.., m, k] @ b [.., k, n], with at most one batch dim, in
a wider type than its operands have; `autopar::product(a, b, dtype, choice)`: a [m, k] @ b [k, n] in
this type, by a kernel that was chosen among cuBLASLt's.

Sums of a product are made in float32 anyway: its kernel writes them as they are. On a CPU, whose
kernels do not, the operands are cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autopar.ops import cublaslt
from autopar.ops.cublaslt import Epilogue
from autopar.ops.library import LIBRARY, define

aten = torch.ops.aten

NARROW_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default})
"""What it may replace, of operands of a narrow type."""

define("wide_product(Tensor a, Tensor b, ScalarType dtype) -> Tensor")
define("product(Tensor a, Tensor b, ScalarType dtype, int choice) -> Tensor")


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    product = torch.mm if a.dim() == 2 else torch.bmm
    made: Tensor = product(a, b, out_dtype=dtype)
    return made


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, _choice: int) -> Tensor:
    return a @ b if dtype is a.dtype else wide_product(a, b, dtype)


def _product_cuda(a: Tensor, b: Tensor, dtype: torch.dtype, choice: int) -> Tensor:
    return cublaslt.product(a, b, Epilogue.NONE, out_dtype=dtype, choice=choice)


def _fake_product(a: Tensor, b: Tensor, dtype: torch.dtype, choice: int) -> Tensor:
    return _fake(a, b, dtype)


def _fake(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype)


LIBRARY.impl("wide_product", wide_product, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::wide_product", _fake, lib=LIBRARY)
LIBRARY.impl("product", _product, "CPU")
LIBRARY.impl("product", _product_cuda, "CUDA")
torch.library.register_fake("autopar::product", _fake_product, lib=LIBRARY)


def product_flops(a_shape: Any, b_shape: Any, *_args: Any, **_kwargs: Any) -> int:
    """Of two matrices; a multiply-add is two."""
    return int(2 * a_shape[0] * a_shape[1] * b_shape[1])


register_flop_formula(torch.ops.autopar.product)(product_flops)
