"""Search options: sizes in text, limits checked at birth."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.errors import OptionError
from autopar.options import SearchOptions, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        (512, 512.0),
        ("512", 512.0),
        ("70GiB", 70 * 2.0**30),
        (" 1.5 MiB ", 1.5 * 2**20),
        ("80gb", 80e9),
        ("3 kB", 3000.0),
        ("12B", 12.0),
    ],
)
def test_sizes(text: str | float | None, size: float | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "70 giga", "-1GiB", "1.2.3", ".", "0", 0, -5, float("nan"), float("inf")]
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(OptionError):
        parse_bytes(text)


@pytest.mark.parametrize(
    "option",
    [
        {"num_stages": 0},
        {"num_microbatches": -1},
        {"num_layers": 0},
        {"candidates": 0},
        {"mesh_shape": ()},
        {"mesh_shape": (2, 0)},
        {"budget_fraction": 0.0},
        {"budget_fraction": 1.5},
        {"time_limit_s": 0.0},
        {"target_gap": 1.0},
        {"target_gap": -0.1},
        {"max_axes": 0},
    ],
    ids=str,
)
def test_limits(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        SearchOptions(**option)
