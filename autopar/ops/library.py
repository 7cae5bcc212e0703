"""The `autopar` operator library: one place where our schemas are declared.

Every operator is functional (no result aliases an operand) but those whose names end in an
underscore, which write where they are told; it takes local shards as well as whole tensors, and
returns contiguous results, so that fake and real kernels agree on strides.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

LIBRARY = torch.library.Library("autopar", "DEF")


def define(schema: str) -> None:
    """Declare an operator whose results depend on nothing but its arguments."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


@functools.cache
def has_triton() -> bool:
    """Whether our own kernels can be compiled."""
    return importlib.util.find_spec("triton") is not None
