"""The matrix of models survives a model that crashes or hangs, and its rows merge."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from benchmarks.zoo import FAST_LINKS, MATRIX, Report, Request, cells_of, merge, wanted
from benchmarks.zoo_table import markdown

KEY = {"plan": MATRIX[0], "dtype": "float32"}
GOOD = {**KEY, "ok": True, "meshes": "4", "sharded": 0.9, "loss": 1e-8, "gradient": 2e-7}
REQUEST = Request("gpt2", ((MATRIX[0], "float32"),), str(FAST_LINKS), processes=False)


def crash(_request: Request, report: Report) -> None:
    report({"plan": "capture", "ok": True, "operators": 3})
    report(KEY)
    os._exit(7)


def hang(_request: Request, report: Report) -> None:
    report(KEY)
    time.sleep(600)


def test_a_crash_leaves_its_reason_in_the_cell() -> None:
    first, second = cells_of(REQUEST, 120, crash)
    assert first["ok"]
    assert second == {**KEY, "ok": False, "reason": "the process ended with code 7"}


def test_silence_ends_the_process() -> None:
    cells = list(cells_of(REQUEST, 0.1, hang))
    assert [cell["ok"] for cell in cells] == [False]
    assert "no answer in" in cells[0]["reason"]


@pytest.fixture
def record() -> dict[str, Any]:
    found: dict[str, Any] = {
        "commit": "0123abcd",
        "command": "python -m benchmarks.zoo",
        "versions": {"torch": "2.13.0"},
        "hardware": {"cores": 2, "cpu": "a CPU"},
        "models": {},
    }
    merge(found, "gpt2", {"plan": "capture", "ok": True, "operators": 586, "fallbacks": []})
    return found


def test_a_later_cell_replaces_an_earlier_one(record: dict[str, Any]) -> None:
    merge(record, "gpt2", {**KEY, "ok": False, "reason": "torn"})
    assert wanted(record, "gpt2", MATRIX, ["float32"], resume=True)[0] == (MATRIX[0], "float32")
    assert "## What fails" in markdown(record) and "torn" in markdown(record)
    merge(record, "gpt2", GOOD)
    assert len(record["models"]["gpt2"]) == 2
    assert (MATRIX[0], "float32") not in wanted(record, "gpt2", MATRIX, ["float32"], resume=True)
    assert (MATRIX[0], "float32") in wanted(record, "gpt2", MATRIX, ["float32"], resume=False)


def test_the_table_has_a_row_per_model(record: dict[str, Any]) -> None:
    merge(record, "gpt2", GOOD)
    text = markdown(record)
    assert "**1 of 1 verify**" in text and "What fails" not in text
    row = next(line for line in text.splitlines() if line.startswith("| gpt2"))
    assert "586 operators" in row and "1 of 1" in row and "2.0e-07" in row
    assert "- `clip`: " in text and "not that of its rows alone" in text
