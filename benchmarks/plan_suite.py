"""Planning time: seconds by pass and peak memory, each repetition in a fresh process.

Nothing is warm: the process imports torch, builds the model on meta, captures and searches. A pass
lasts from its own progress message to the next one.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.summary import summary

PASSES = (
    "capture",
    "layers",
    "recompute",
    "layer points",
    "stage cut",
    "exact stages",
    "simulate",
)
_RESULT = "autopar-plan-result "  # starts the line of stdout that has the result
_TIMEOUT_S = 1800


class PassClock:
    """Seconds by pass, from progress messages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def __call__(self, text: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        known = [name for name in PASSES if text.startswith(name)]
        self._name = max(known, key=len) if known else "other"
        self._since = now


def measure(case: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All repetitions of one PlanCase. RuntimeError with the error of the process that failed."""
    request = {
        "model": case.model,
        "cluster": case.cluster,
        "batch": case.batch,
        "options": dict(case.options),
    }
    runs = [_fresh_process(request) for _ in range(settings["repeats"])]
    first = runs[0]
    passes = {
        name: summary([run["passes"].get(name, 0.0) for run in runs]).median
        for name in first["passes"]
    }
    return {
        **request,
        "plan_s": summary([run["plan_s"] for run in runs]).to_dict(),
        "process_s": summary([run["process_s"] for run in runs]).to_dict(),
        "passes_s": passes,
        "rss_bytes": max(run["rss_bytes"] for run in runs),
        "predicted_step_s": first["predicted_step_s"],
        "gap": first["gap"],
        "plan": first["plan"],
    }


def plan_once(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the fresh process does. plan_s: capture and search; the model is built before."""
    import torch

    from autopar.api import plan_model
    from autopar.options import SearchOptions
    from autopar.report.text import plan_text
    from benchmarks.suites import build
    from cost_models import Cluster

    with torch.device("meta"):
        model, batch = build(request["model"], request["batch"])
    options = dict(request["options"])
    if "mesh_shape" in options:
        options["mesh_shape"] = tuple(options["mesh_shape"])
    clock = PassClock()
    started = time.perf_counter()
    plan, graph = plan_model(
        model,
        batch,
        Cluster.parse(request["cluster"]),
        options=SearchOptions(cache=False, **options),
        progress=clock,
    )
    clock("end")
    return {
        "plan_s": time.perf_counter() - started,
        "passes": clock.seconds,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "predicted_step_s": plan.step_s,
        "gap": plan.search.gap,
        "plan": plan_text(plan, graph=graph),
    }


def _fresh_process(request: Mapping[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_suite", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    elapsed = time.perf_counter() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stderr.strip()[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(_RESULT))
    return {**result, "process_s": elapsed}


if __name__ == "__main__":
    print(_RESULT + json.dumps(plan_once(json.loads(sys.argv[1]))))
