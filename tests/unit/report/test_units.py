from __future__ import annotations

import pytest

from autopar.report.units import (
    bar_text,
    bytes_text,
    flops_text,
    percent_text,
    range_text,
    seconds_text,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (2e-9, "2.00 ns"),
        (4.56e-5, "45.6 µs"),
        (9.996e-4, "1.00 ms"),
        (5.876e-3, "5.88 ms"),
        (0.1234, "123 ms"),
        (12.34, "12.3 s"),
        (125, "2 min 5 s"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1536, "1.50 KiB"),
        (70 * 2**30, "70.0 GiB"),
        (2**40, "1.00 TiB"),
    ],
)
def test_bytes(nbytes: float, text: str) -> None:
    assert bytes_text(nbytes) == text


@pytest.mark.parametrize(
    ("flops", "text"), [(0, "0"), (1234, "1.23 k"), (9.9996e8, "1.00 G"), (6.45e13, "64.5 T")]
)
def test_flops(flops: float, text: str) -> None:
    assert flops_text(flops) == text


def test_bars_show_any_use_and_never_overflow() -> None:
    assert bar_text(0.0, 4) == "░░░░"
    assert bar_text(0.001, 4) == "█░░░"
    assert bar_text(1.7, 4) == "████"


def test_ranges_and_percents() -> None:
    assert range_text((0, 1, 2, 3, 8, 9, 11)) == "0-3, 8-9, 11"
    assert percent_text(0.2) == "20.0 %"
