from __future__ import annotations

import json

from autopar.actions import ActionKind
from autopar.report.trace import trace_record
from autopar.schedule import interleaved
from autopar.simulate import StageCost, Transfer, simulate


def test_every_event_and_every_change_of_memory_is_there() -> None:
    cost = StageCost(1.0, 2.0, rest_bytes=100, saved_bytes_per_microbatch=10)
    timeline = simulate(interleaved(4, 2, 2), [cost] * 4, [Transfer(0, 1, ActionKind.FORWARD, 0.5)])
    record = json.loads(json.dumps(trace_record(timeline)))
    events = record["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.events)
    assert max(e["ts"] + e["dur"] for e in spans) == timeline.step_s * 1e6
    assert {(e["pid"], e["args"]["stage"]) for e in spans} == {(0, 0), (0, 2), (1, 1), (1, 3)}
    peaks = [
        max(e["args"]["bytes"] for e in events if e["name"] == f"bytes of stage {stage}")
        for stage in range(4)
    ]
    assert tuple(peaks) == timeline.peak_bytes
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["compute", "compute", "link 0->1"]
    (sent,) = [e for e in spans if names[e["pid"], e["tid"]] == "link 0->1" and e["name"] == "F0"]
    assert (sent["ts"], sent["dur"]) == (1e6, 0.5e6)
