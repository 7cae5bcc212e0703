"""A simulated step as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

The Trace Event Format: a process per stage, a thread per stream, a complete event ("ph": "X") per
busy span. Times are microseconds, as the format has them.
"""

from __future__ import annotations

from typing import Any

from autopar.simulate import Timeline

_US = 1e6


def trace_record(timeline: Timeline) -> dict[str, Any]:
    """JSON-ready. O(events)."""
    streams: dict[tuple[int, str], int] = {}  # (stage, stream) -> thread
    events = []
    for event in timeline.events:
        key = (event.stage, event.stream)
        thread = streams.setdefault(key, sum(1 for stage, _ in streams if stage == event.stage))
        events.append(
            {
                "name": event.label,
                "cat": event.stream.split()[0],
                "ph": "X",
                "ts": event.start_s * _US,
                "dur": (event.end_s - event.start_s) * _US,
                "pid": event.stage,
                "tid": thread,
                "args": {"stage": event.stage},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
