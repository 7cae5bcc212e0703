"""A simulated step as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

The Trace Event Format: a process per worker, a thread per stream, a complete event ("ph": "X") per
busy span, a counter ("ph": "C") of each stage's bytes. Times are microseconds, as the format has
them.
"""

from __future__ import annotations

from typing import Any

from autopar.simulate import Timeline

_US = 1e6


def trace_record(timeline: Timeline) -> dict[str, Any]:
    """JSON-ready. O(events)."""
    workers = timeline.num_workers
    streams: dict[tuple[int, str], int] = {}  # (worker, stream) -> thread
    events: list[dict[str, Any]] = []
    for event in timeline.events:
        worker = event.stage % workers
        if (worker, event.stream) not in streams:
            streams[worker, event.stream] = sum(1 for w, _ in streams if w == worker)
        events.append(
            {
                "name": event.label,
                "cat": event.stream.split()[0],
                "ph": "X",
                "ts": event.start_s * _US,
                "dur": (event.end_s - event.start_s) * _US,
                "pid": worker,
                "tid": streams[worker, event.stream],
                "args": {"stage": event.stage},
            }
        )
    for stage, series in enumerate(timeline.memory):
        events += [
            {
                "name": f"bytes of stage {stage}",
                "ph": "C",
                "ts": time * _US,
                "pid": stage % workers,
                "args": {"bytes": size},
            }
            for time, size in series
        ]
    names = [_name("process", worker, 0, f"worker {worker}") for worker in range(workers)]
    names += [_name("thread", worker, tid, s) for (worker, s), tid in streams.items()]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    """A metadata event."""
    return {"name": f"{what}_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
