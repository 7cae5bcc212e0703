"""What a profile of the GPU says: how long it computes, communicates, waits, and in which kernels.

    compute        kernels that are not NCCL's, copies and fills beside them
    communication  NCCL's kernels; copies between devices, and those on streams without kernels
    exposed        communication while nothing computes
    idle           neither, between the first and the last event

Events overlap, so that all of these are measures of unions of intervals. Nothing counts that starts
before the last mark: a GPU waits for the host when a profile begins, as it does not in training.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_TOP = 10
_MARK = "spin_kernel"

Interval = tuple[float, float]


def load(path: Path) -> list[Mapping[str, Any]]:
    """Events of a Chrome trace, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        events: list[Mapping[str, Any]] = json.load(file)["traceEvents"]
    return events


def mark() -> None:
    """Puts the mark on the current stream."""
    torch.cuda._sleep(1)


def analysis(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds of one step. ValueError without a mark."""
    compute: list[Interval] = []
    communication: list[Interval] = []
    kernels: dict[str, tuple[float, int]] = {}
    found = _after_mark([e for e in events if e.get("ph") == "X" and e.get("cat") in _ON_DEVICE])
    computing = {_stream(e) for e in found if e["cat"] == "kernel" and not _is_nccl(e)}
    for event in found:
        start, length, name = float(event["ts"]), float(event["dur"]), str(event["name"])
        group = communication if _is_nccl(event) or _travels(event, computing) else compute
        group.append((start, start + length))
        total, count = kernels.get(name, (0.0, 0))
        kernels[name] = total + length, count + 1
    busy, talking = union(compute), union(communication)
    both = union([*compute, *communication])
    span = both[-1][1] - both[0][0] if both else 0.0
    ms = 1e-3  # of a microsecond
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:_TOP]
    return {
        "span_ms": span * ms,
        "compute_ms": measure(busy) * ms,
        "communication_ms": measure(talking) * ms,
        "exposed_communication_ms": (measure(both) - measure(busy)) * ms,
        "idle_ms": (span - measure(both)) * ms,
        "kernels": [
            {"name": name, "ms": total * ms, "count": count} for name, (total, count) in longest
        ],
    }


def _after_mark(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not events:
        return []
    marks = [float(e["ts"]) + float(e["dur"]) for e in events if _MARK in str(e["name"])]
    if not marks:
        raise ValueError("the profile holds no mark: where the step begins is not known")
    return [e for e in events if float(e["ts"]) >= max(marks)]


def _stream(event: Mapping[str, Any]) -> Any:
    return event.get("args", {}).get("stream")


def _is_nccl(event: Mapping[str, Any]) -> bool:
    return "nccl" in str(event["name"]).lower()


def _travels(event: Mapping[str, Any], computing: Container[Any]) -> bool:
    """Whether it is a copy to another device, or of a stream that only copies."""
    if event["cat"] != "gpu_memcpy":
        return False
    return "PtoP" in str(event["name"]) or _stream(event) not in computing


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same. O(n log n)."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def measure(disjoint: Sequence[Interval]) -> float:
    return sum(stop - start for start, stop in disjoint)
