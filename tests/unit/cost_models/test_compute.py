"""The roofline against hand numbers and against the rates measured on an H100."""

from dataclasses import replace

import numpy as np
import pytest

from cost_models import UnknownHardwareError, device, matmul_s, pointwise_s

# Plateau 80 TFLOP/s in bfloat16, 8 in float32; 900 GB/s; 5 us a launch; ramp 1e9 / 80e12 = 12.5 us.
TOY = replace(
    device("h100"),
    name="toy",
    peak_flops={"bfloat16": 100e12, "float32": 10e12},
    vector_flops=10e12,
    memory_bandwidth_bytes_per_s=1e12,
    launch_s=5e-6,
    matmul_efficiency=0.8,
    memory_efficiency=0.9,
    matmul_half_flops=1e9,
)


def test_hand_numbers() -> None:
    assert matmul_s(8e9, 0, "bfloat16", TOY) == pytest.approx(5e-6 + 12.5e-6 + 100e-6)
    assert matmul_s(8e9, 0, "float32", TOY) == pytest.approx(5e-6 + 12.5e-6 + 1000e-6)
    assert matmul_s(8e9, 900e6, "bfloat16", TOY) == pytest.approx(5e-6 + 1e-3)  # memory bound
    assert pointwise_s(1e6, 9e6, TOY) == pytest.approx(5e-6 + 10e-6)  # memory bound
    assert pointwise_s(1e9, 9e6, TOY) == pytest.approx(5e-6 + 100e-6)


def test_half_flops_is_where_the_rate_is_half_the_plateau() -> None:
    seconds = matmul_s(TOY.matmul_half_flops, 0, "bfloat16", TOY) - TOY.launch_s
    assert TOY.matmul_half_flops / seconds == pytest.approx(0.5 * 80e12)


@pytest.mark.parametrize("name", ["h100", "h200", "a100", "v100", "cpu"])
def test_monotone(name: str) -> None:
    kind = device(name)
    work = np.geomspace(1, 1e14, 40)
    for seconds in (
        matmul_s(work, 1e6, "float32", kind),
        matmul_s(1e6, work, "float32", kind),
        pointwise_s(work, work, kind),
    ):
        assert np.all(np.diff(seconds) >= 0)
        assert np.all(seconds >= kind.launch_s)


def test_arrays_elementwise_and_broadcast() -> None:
    flops = np.array([0.0, 1e9, 1e12])
    moved = np.array([1e3, 1e8, 1e6])
    both = matmul_s(flops, moved, "bfloat16", TOY)
    light = pointwise_s(flops, 1e6, TOY)
    for index, (f, m) in enumerate(zip(flops.tolist(), moved.tolist(), strict=True)):
        assert both[index] == matmul_s(f, m, "bfloat16", TOY)
        assert light[index] == pointwise_s(f, 1e6, TOY)


def test_dtype_without_a_rate_is_an_error() -> None:
    with pytest.raises(UnknownHardwareError, match="it has float64, float32, float16"):
        matmul_s(1e9, 1e6, "bfloat16", device("v100"))


@pytest.mark.parametrize("size", [8192, 16384])
def test_h100_large_matmuls_run_at_the_measured_rate(size: int) -> None:
    """Measured: 750-790 TFLOP/s in bfloat16 at large sizes."""
    flops = 2 * size**3
    rate = flops / matmul_s(flops, 2 * 3 * size**2, "bfloat16", device("h100"))
    print(f"h100 bfloat16 {size}^3: {rate / 1e12:.0f} TFLOP/s predicted, 750-790 measured")
    assert 750e12 <= rate <= 790e12
