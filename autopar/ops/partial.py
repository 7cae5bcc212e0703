"""`autopar::keep_on_first(x, coordinate) -> x or zeros`: a replicated value as a pending sum.

Coordinate 0 of the axis keeps the value, the others hold zeros, so that the sum over the axis is
the value again. Not a product with 0 or 1: that would turn infinities into NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

define("keep_on_first(Tensor x, SymInt coordinate) -> Tensor")


def keep_on_first(x: Tensor, coordinate: int) -> Tensor:
    """The same operators on every coordinate, so that what a compiler makes of them differs in
    numbers only: a rank that read nothing here could leave out a collective before it."""
    first = torch.full((), coordinate == 0, dtype=torch.bool, device=x.device)
    return torch.where(first, x, torch.zeros((), dtype=x.dtype, device=x.device)).contiguous()


LIBRARY.impl("keep_on_first", keep_on_first, "CompositeExplicitAutograd")
torch.library.register_fake(
    "autopar::keep_on_first", lambda x, coordinate: torch.empty_like(x), lib=LIBRARY
)
