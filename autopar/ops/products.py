"""`autopar::wide_product(a, b, dtype)`: a [.., m, k] @ b [.., k, n], with at most one batch dim, in
a wider type than its operands have.

Sums of a product are made in float32 anyway: its kernel writes them as they are. On a CPU, whose
kernels do not, the operands are cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

aten = torch.ops.aten

NARROW_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default})
"""What it may replace, of operands of a narrow type."""

define("wide_product(Tensor a, Tensor b, ScalarType dtype) -> Tensor")


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    product = torch.mm if a.dim() == 2 else torch.bmm
    made: Tensor = product(a, b, out_dtype=dtype)
    return made


def _fake(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype)


LIBRARY.impl("wide_product", wide_product, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::wide_product", _fake, lib=LIBRARY)
