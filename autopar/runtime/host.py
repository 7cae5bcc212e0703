"""The memory of the device's host, where some parameters rest: pinned where CUDA copies from it.

Copies between host and device may still run when a call returns; `wait_for_copies` says when the
host may read or write what they touch.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")


def to_host(tensor: Tensor, device: torch.device) -> Tensor:
    """The value in the host's memory; without a copy where it is there and `device`, which will
    copy from or to it, needs no pinned one."""
    if device.type != "cuda" or (tensor.device == HOST and tensor.is_pinned()):
        return tensor.to(HOST)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Returns when what the device's current stream was given so far is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
