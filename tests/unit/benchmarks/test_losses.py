"""Distances of curves and growth of memory, against sums by hand."""

from __future__ import annotations

import pytest

from benchmarks.losses import distances, growth, markdown, summarise, svg
from benchmarks.text import byte_batches, library


def test_distances_of_curves() -> None:
    assert distances([3.0, 2.0, 1.0], [3.0, 2.3, 0.6]) == pytest.approx((0.4, (0.25 / 3) ** 0.5))


def test_memory_grows_by_what_the_last_steps_have_more() -> None:
    assert growth([0, *[100] * 13, 150, *[300] * 10]) == 200
    assert growth([50]) == 0
    assert growth([50, 70, 70]) == 0


def test_a_report_has_a_row_for_each_curve_and_says_what_failed() -> None:
    runners = {
        "autopar": {"losses": [3.0, 2.0], "allocated_bytes": [1, 1]},
        "zero-2": {"losses": [3.0, 2.5], "allocated_bytes": [1, 1]},
        "ddp": {"error": "OutOfMemoryError: much\nmore"},
    }
    summary = summarise(runners)
    assert summary["autopar"]["largest_difference"] == 0.5
    record = {"case": "gpt-tiny", "commit": "c", "date": "d", "command": "x", "steps": 2}
    text = markdown({**record, "summary": summary, "runners": runners})
    assert "| autopar | 3.0000 | 2.0000 | 5.00e-01 | 3.54e-01 | 0 B |" in text
    assert "- ddp: OutOfMemoryError: much\n" in text
    picture = svg({"autopar": [3.0, 2.0], "zero-2": [3.0, 2.5]})
    assert picture.count("<polyline") == 2


def test_sources_are_text_of_this_python() -> None:
    assert len(library()) > 2_000_000
    assert b"class Thread" in library()
    (batch,) = byte_batches(2, 8, 1, seed=3, source=b"0123456789")
    assert all(bytes(row.tolist()) in b"0123456789" for row in batch)
