"""`autopar::hub(x) -> x`: a copy of a value at which a plan may change its layout.

A value with many readers would pay the same reshard once per reader. A hub gives the value one more
layout, chosen once and read by all of them. It has the semantics of `aten.clone`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

define("hub(Tensor x) -> Tensor")


def _hub(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _hub_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _hub_grad(ctx: Any, grad: Tensor) -> Tensor:
    return grad


LIBRARY.impl("hub", _hub, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::hub", _hub_fake, lib=LIBRARY)
torch.library.register_autograd("autopar::hub", _hub_grad, lib=LIBRARY)
