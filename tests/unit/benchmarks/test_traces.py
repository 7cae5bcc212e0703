"""What a made-up profile says, against sums by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import traces


def _event(name: str, start: float, length: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}


# µs        0    10   20   30   40   50   60   70   80
# compute   [matmul----]         [gelu]        [copy]
# nccl           [all-gather]              [ag]
MARK = _event("at::cuda::spin_kernel(long)", -2, 1)
EVENTS = [
    MARK,
    _event("matmul", 0, 20),
    _event("ncclDevKernel_AllGather", 10, 20),
    _event("gelu", 40, 10),
    _event("ncclDevKernel_AllGather", 65, 5),
    _event("Memcpy DtoD", 70, 10, "gpu_memcpy"),
    _event("aten::mm", 0, 500, "cpu_op"),
    {"ph": "M", "name": "process_name"},
]


def test_intervals_are_told_apart() -> None:
    found = traces.analysis(EVENTS)
    assert found["span_ms"] == pytest.approx(0.080)
    assert found["compute_ms"] == pytest.approx(0.040)
    assert found["communication_ms"] == pytest.approx(0.025)
    assert found["exposed_communication_ms"] == pytest.approx(0.015)
    assert found["idle_ms"] == pytest.approx(0.025)
    assert [(k["name"], k["count"]) for k in found["kernels"]] == [
        ("ncclDevKernel_AllGather", 2),
        ("matmul", 1),
        ("gelu", 1),
        ("Memcpy DtoD", 1),
    ]


def test_what_starts_before_the_last_mark_does_not_count() -> None:
    before = [_event("matmul", -90, 30), MARK | {"ts": -95}]
    assert traces.analysis([*before, *EVENTS]) == traces.analysis(EVENTS)
    with pytest.raises(ValueError, match="no mark"):
        traces.analysis(EVENTS[1:])


def test_copies_between_devices_communicate() -> None:
    """Those on a stream without kernels, and those that say so."""
    copies = [("DtoD", 20, 7), ("PtoP", 40, 1), ("DtoD", 60, 1)]
    events = [MARK, _event("matmul", 0, 10) | {"args": {"stream": 1}}] + [
        _event(f"Memcpy {kind}", start, 10, "gpu_memcpy") | {"args": {"stream": stream}}
        for kind, start, stream in copies
    ]
    found = traces.analysis(events)
    assert found["compute_ms"] == pytest.approx(0.020)
    assert found["communication_ms"] == found["exposed_communication_ms"] == pytest.approx(0.020)


def test_a_trace_without_a_device_is_all_zero() -> None:
    found = traces.analysis([_event("aten::mm", 0, 5, "cpu_op")])
    assert found["span_ms"] == found["idle_ms"] == 0.0
    assert found["kernels"] == []


def test_nested_and_touching_intervals_are_one() -> None:
    assert traces.union([(5, 6), (0, 4), (1, 2), (4, 5)]) == [(0, 6)]


def test_traces_are_read_as_they_are_written(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": EVENTS})
    plain, packed = tmp_path / "a.json", tmp_path / "a.json.gz"
    plain.write_text(text, encoding="utf-8")
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write(text)
    assert traces.load(plain) == traces.load(packed) == EVENTS
