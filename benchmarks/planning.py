"""Planning time of published models: the whole command, from its start to the written plan.

    python -m benchmarks.planning --repeats 3 --write
    python -m benchmarks.planning --only gpt2-124m,llama-3-8b --time-limit 60

Each repetition is a process of its own without kept plans, with the bytecode of autopar kept, as
where it is installed. Memory: its resident set at its largest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopar.plan import ParallelPlan, StagePlan
from benchmarks import jobs
from benchmarks.forced import header_text, table_text
from benchmarks.run import RESULTS
from benchmarks.summary import summary

_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Workload:
    """factory: in benchmarks.published. target_s, target_gib: of the whole command."""

    name: str
    factory: str
    cluster: str
    precision: str
    target_s: float
    target_gib: float | None = None


WORKLOADS = (
    Workload("gpt2-124m", "gpt2_124m", "h100:1x8", "bf16", 6, 1.0),
    Workload("llama-3-8b", "llama_3_8b", "h100:1x8", "bf16", 12, 1.2),
    Workload("llama-3-8b-8x8", "llama_3_8b", "h100:8x8", "bf16", 20),
    Workload("gpt-39b", "gpt_39b", "v100:8x8", "fp32", 20),
    Workload("mixtral-8x7b", "mixtral_8x7b", "h100:4x8", "bf16", 30),
    Workload("llama-3-405b", "llama_3_405b", "h100:128x8", "bf16", 60, 2.0),
    Workload("llama-3-405b-2048x8", "llama_3_405b_wide", "h100:2048x8", "bf16", 120),
)


def run(workload: Workload, time_limit_s: float | None) -> dict[str, Any]:
    """One command. error: its last words, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "autopar", "plan"]
        command += [f"benchmarks.published:{workload.factory}", "--cluster", workload.cluster]
        command += ["--precision", workload.precision, "--no-cache", "-o", str(path)]
        if time_limit_s is not None:
            command += ["--time-limit", f"{time_limit_s:g}"]
        log = Path(folder) / "log"
        started = time.perf_counter()
        pid = os.posix_spawn(
            sys.executable,
            command,
            {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        _, status, used = os.wait4(pid, 0)
        found: dict[str, Any] = {
            "seconds": time.perf_counter() - started,
            "cpu_s": used.ru_utime + used.ru_stime,
            "rss_bytes": used.ru_maxrss * 1024,
        }
        if status or not path.exists():
            return {**found, "error": log.read_text(encoding="utf-8", errors="replace")[-2000:]}
        plan = ParallelPlan.load(path)
        return {
            **found,
            "step_s": plan.step_s,
            "gap": plan.search.gap,
            "stages": [_stage(s) for s in plan.stages],
            "microbatches": plan.num_microbatches,
            "schedule": str(plan.schedule),
            "notes": list(plan.search.notes),
            "passes_s": dict(plan.search.seconds),
        }


def measure(workload: Workload, repeats: int, time_limit_s: float | None) -> dict[str, Any]:
    """All repetitions of one workload."""
    runs = [run(workload, time_limit_s) for _ in range(repeats)]
    seconds = summary([r["seconds"] for r in runs]).to_dict()
    return {**asdict(workload), "seconds": seconds, "runs": runs}


_HEAD = ("workload", "cluster", "seconds: median, least to most", "target", "RSS, GiB")
_HEAD += ("step, s", "gap", "plan")


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the table."""
    times = sorted(r["seconds"] for r in row["runs"])
    last = row["runs"][-1]
    rss = max(r["rss_bytes"] for r in row["runs"]) / _GIB
    if "error" in last:
        answer = ("no plan", "", last["error"].strip().splitlines()[-1][:160])
    else:
        plan = f"{last['microbatches']} microbatches, {last['schedule']}: {_runs(last['stages'])}"
        plan += "".join(f"; {note}" for note in last["notes"])
        answer = (f"{last['step_s']:.4g}", f"{last['gap']:.2%}", plan)
    seconds = f"{row['seconds']['median']:.1f}, {times[0]:.1f} to {times[-1]:.1f}"
    return (row["name"], row["cluster"], seconds, f"{row['target_s']:g}", f"{rss:.2f}", *answer)


def _stage(stage: StagePlan) -> str:
    mesh = "x".join(map(str, stage.axis_sizes))
    return f"{stage.last_layer - stage.first_layer + 1} layers on {mesh}"


def _runs(stages: Sequence[str]) -> str:
    """Equal neighbours counted."""
    found: list[list[Any]] = []
    for stage in stages:
        if found and found[-1][1] == stage:
            found[-1][0] += 1
        else:
            found.append([1, stage])
    return ", ".join(text if count == 1 else f"{count} x ({text})" for count, text in found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="workloads, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=None, help="seconds of each search")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name]
    unknown = set(names) - {w.name for w in WORKLOADS}
    if unknown:
        known = ", ".join(w.name for w in WORKLOADS)
        parser.error(f"no workload {', '.join(sorted(unknown))}: there are {known}")
    rows = []
    for workload in WORKLOADS:
        if not names or workload.name in names:
            rows.append(measure(workload, options.repeats, options.time_limit))
            print(*line(rows[-1]), sep=" | ", flush=True)
    head = header_text("Planning time", jobs.command("planning"), jobs.where())
    text = f"{head}\n{table_text(_HEAD, [line(row) for row in rows])}\n"
    print(text)
    if options.write:
        path = RESULTS / f"planning-{time.strftime('%Y%m%d')}.md"
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
