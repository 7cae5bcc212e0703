"""Seconds of one operator on one device: a roofline (Williams et al., CACM 52(4), 2009).

    matmul      launch_s + max((W + H) / P, M / b)      W FLOP, M bytes read and written
    pointwise   launch_s + max(W / v, M / b)

P = matmul_efficiency * peak_flops[dtype] is the plateau, b = memory_efficiency * bandwidth, v =
vector_flops. H makes the rate depend on the shape: W/((W + H)/P) is P/2 at W = H and P for W much
larger, as few tiles leave most of the chip idle (Hockney's n_1/2). `matmul_half_flops` is H at the
fastest data type; the ramp H/P is taken to be the same seconds at the others, being fill and drain
and not arithmetic.
"""

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cost_models.hardware import DeviceKind


@overload
def matmul_s(flops: float, bytes_moved: float, dtype: str, device: DeviceKind) -> float: ...
@overload
def matmul_s(
    flops: NDArray[Any], bytes_moved: float | NDArray[Any], dtype: str, device: DeviceKind
) -> NDArray[np.float64]: ...
@overload
def matmul_s(
    flops: float, bytes_moved: NDArray[Any], dtype: str, device: DeviceKind
) -> NDArray[np.float64]: ...
def matmul_s(
    flops: float | NDArray[Any],
    bytes_moved: float | NDArray[Any],
    dtype: str,
    device: DeviceKind,
) -> float | NDArray[np.float64]:
    """Seconds of a matmul, batched or not. `dtype`, of the operands: a key of `peak_flops`."""
    plateau_flops_per_s = device.matmul_efficiency * device.peak(dtype)
    ramp_s = device.matmul_half_flops / (device.matmul_efficiency * max(device.peak_flops.values()))
    return _roofline_s(flops / plateau_flops_per_s + ramp_s, bytes_moved, device)


@overload
def pointwise_s(flops: float, bytes_moved: float, device: DeviceKind) -> float: ...
@overload
def pointwise_s(
    flops: NDArray[Any], bytes_moved: float | NDArray[Any], device: DeviceKind
) -> NDArray[np.float64]: ...
@overload
def pointwise_s(
    flops: float, bytes_moved: NDArray[Any], device: DeviceKind
) -> NDArray[np.float64]: ...
def pointwise_s(
    flops: float | NDArray[Any], bytes_moved: float | NDArray[Any], device: DeviceKind
) -> float | NDArray[np.float64]:
    """Seconds of a pointwise, reduction or copy kernel."""
    return _roofline_s(flops / device.vector_flops, bytes_moved, device)


def _roofline_s(
    arithmetic_s: float | NDArray[Any], bytes_moved: float | NDArray[Any], device: DeviceKind
) -> float | NDArray[np.float64]:
    memory_s = bytes_moved / (device.memory_efficiency * device.memory_bandwidth_bytes_per_s)
    if isinstance(arithmetic_s, np.ndarray) or isinstance(memory_s, np.ndarray):
        return np.maximum(arithmetic_s, memory_s) + device.launch_s
    return max(arithmetic_s, memory_s) + device.launch_s
