"""Training speed: autopar and the baselines, one after another in one job of torchrun.

A step is forward, backward and AdamW on the global batch. Steps follow one another as in training,
without waiting for the GPUs; a step's time is from the end of the one before, as the slowest rank's
GPU sees it. gloo runs on CPU processes in float32; NCCL on GPUs computes and reduces in bfloat16
with float32 parameters and states.

A runner that fails ends its job, since no rank knows what the others still wait for; so does one
that hangs. Its error is recorded, and another job goes on with the next runner.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.models import MODELS
from benchmarks.suites import items_per_batch

OURS = "autopar"
CLOSE = 0.03  # a plan this much slower than the fastest one counts as fast
RUNNER_LIMIT_S = 420.0
PRECISIONS = {"gloo": "model", "nccl": "bf16/bf16"}
_NOT_RUN = "not run"
_POLL_S = 1.0
_END_S = 60.0
_STDERR_CHARS = 4000
_HUNG = "Timeout ("  # what faulthandler writes when it ends a process

Runner = dict[str, Any]
Note = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case runs. gpus: indices of those that it may see, all where None. until: of
    time.monotonic(). traces: folder for profiles. turns: lock file of jobs that share the GPUs
    (`benchmarks.turns`). stop: set to end what runs."""

    gpus: tuple[int, ...] | None = None
    until: float = float("inf")
    traces: Path | None = None
    turns: Path | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def over(self) -> str:
        """Why nothing more may run, if so."""
        if self.stop.is_set():
            return "interrupted"
        return "the time was over" if time.monotonic() >= self.until else ""


def measure(
    case: Any, settings: Mapping[str, Any], place: Place = Place(), note: Note = lambda _: None
) -> dict[str, Any]:
    """One SpeedCase. settings: devices, backend, steps, warmup, and runners, if not all of them.
    note: is told the result after every runner. RuntimeError where no runner succeeds."""
    names = list(settings.get("runners") or runner_names(settings["devices"]))
    runners: dict[str, Runner] = {}

    def result() -> dict[str, Any]:
        return _result(case, settings, place, {n: runners[n] for n in names if n in runners})

    while left := [name for name in names if name not in runners]:
        if over := place.over():
            runners |= {name: {"error": f"{_NOT_RUN}: {over}"} for name in left}
            break
        request = {**settings, "case": case.name, "runners": left}
        for finished in run_job(request, place):
            runners |= finished
            note(result())
    if all("error" in runner for runner in runners.values()):
        errors = "; ".join(f"{name}: {r['error']}" for name, r in runners.items())
        raise RuntimeError(f"no runner succeeded: {errors}")
    return result()


def runner_names(devices: int) -> list[str]:
    """All that there are for so many devices."""
    from benchmarks.runners import names

    return names(devices)


def _result(
    case: Any, settings: Mapping[str, Any], place: Place, runners: Mapping[str, Runner]
) -> dict[str, Any]:
    per_step, kind = items_per_batch(case)
    flops = MODELS[case.model].model_flops_per_sample() * case.batch
    return {
        "model": case.model,
        "batch": case.batch,
        "devices": settings["devices"],
        "gpus": None if place.gpus is None else list(place.gpus),
        "backend": settings["backend"],
        "dtype": PRECISIONS[settings["backend"]],
        "items": str(kind),
        "model_flops": flops,
        **compared(runners, per_step=per_step, flops=flops, devices=settings["devices"]),
    }


def compared(
    runners: Mapping[str, Runner], *, per_step: int, flops: float, devices: int
) -> dict[str, Any]:
    """The runners with rate, MFU and ratio to the best baseline; and what the comparison says.
    per_step: items; flops: of the model, per step."""
    from benchmarks.runners import is_plan

    times = {n: r["step_s"]["median"] for n, r in runners.items() if "step_s" in r}
    baselines = {n: t for n, t in times.items() if not is_ours(n)}
    best = min(baselines, key=baselines.__getitem__, default=None)
    plans = {n: t for n, t in times.items() if is_plan(n)}
    fastest = min(plans, key=plans.__getitem__, default=None)
    found: dict[str, Runner] = {}
    for name, runner in runners.items():
        found[name] = dict(runner)
        if name in times:
            peak = runner.get("peak_flops")
            found[name]["items_per_s"] = per_step / times[name]
            found[name]["mfu"] = peak and mfu(flops, times[name], devices, peak)
            found[name]["ratio"] = baselines[best] / times[name] if best else None
    close = len(plans) > 1 and OURS in plans
    return {
        "complete": not any(r.get("error", "").startswith(_NOT_RUN) for r in runners.values()),
        "best_baseline": best,
        "fastest_plan": fastest,
        "pick_is_close": plans[OURS] <= (1 + CLOSE) * min(plans.values()) if close else None,
        "runners": found,
    }


def mfu(flops: float, seconds: float, devices: int, peak_flops: float) -> float:
    """Model FLOP utilization (Chowdhery et al., 2022, appendix B): nothing recomputed counts."""
    return flops / (seconds * devices * peak_flops)


def is_ours(name: str) -> bool:
    return name == OURS or name.startswith(f"{OURS}:")


def run_job(request: Mapping[str, Any], place: Place) -> Iterator[dict[str, Runner]]:
    """The same program on every device, through torchrun; what each runner gave, as they end. At
    least one of the request's runners is among them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if place.traces is not None:
            request = {**request, "traces": str(place.traces)}
        if place.turns is not None:
            request = {**request, "turns": str(place.turns)}
        with (folder / "stderr").open("wb") as stderr:
            job = subprocess.Popen(
                [*_command(request), json.dumps(request), name],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=_environment(request, place),
            )
        with _ended(job):
            over = ""
            seen: set[str] = set()
            while job.poll() is None and not over:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(_POLL_S)
                over = place.over()
                yield from _finished(folder, seen)
        yield from _finished(folder, seen)
        left = [n for n in request["runners"] if n not in seen]
        if left and (over or job.returncode or not seen):
            text = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
            hung = f"no end after {request['runner_limit_s']:.0f} s" if _HUNG in text else ""
            cut = f"{_NOT_RUN} to its end: {over}" if over else ""
            reason = cut or _errors(folder) or hung or f"exit code {job.returncode}"
            yield {left[0]: {"error": reason, "stderr": text[-_STDERR_CHARS:]}}


def _command(request: Mapping[str, Any]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(request["devices"]), "-m", "benchmarks.work"]


@contextlib.contextmanager
def _ended(job: subprocess.Popen[bytes]) -> Iterator[None]:
    """Afterwards nothing of it runs: torchrun ends its processes, which are no children of ours,
    when it is asked to."""
    try:
        yield
    finally:
        job.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(_END_S)
        job.kill()
        job.wait()


def _finished(folder: Path, seen: set[str]) -> Iterator[dict[str, Runner]]:
    """What was written since the last look."""
    for path in sorted(folder.glob("done-*.json")):
        found: dict[str, Runner] = json.loads(path.read_text(encoding="utf-8"))
        if not found.keys() <= seen:
            seen.update(found)
            yield found


def _errors(folder: Path) -> str:
    """What the ranks said, the first that says the most."""
    texts = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("error-*.txt"))]
    memory = [text for text in texts if text.startswith("OutOfMemoryError")]
    return (memory or texts or [""])[0]


def _environment(request: Mapping[str, Any], place: Place) -> dict[str, str]:
    environment = dict(os.environ)
    if request["backend"] == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        threads = max(1, (os.cpu_count() or 1) // request["devices"])
        environment["OMP_NUM_THREADS"] = str(threads)
    elif place.gpus is not None:
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = [visible[index] if visible else str(index) for index in place.gpus]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return environment


def settings(
    *,
    devices: int,
    backend: str,
    steps: int,
    warmup: int,
    runners: str = "",
    runner_limit_s: float = RUNNER_LIMIT_S,
) -> dict[str, Any]:
    """Of `measure`. runners: names, or patterns such as "zero-*", separated by semicolons, as names
    have commas; all if empty. OptionError for one that matches nothing."""
    chosen: dict[str, Any] = {
        "devices": devices,
        "backend": backend,
        "steps": steps,
        "warmup": max(1, warmup),
        "runner_limit_s": runner_limit_s,
    }
    names = [name.strip() for name in runners.split(";") if name.strip()]
    if names:
        chosen["runners"] = _known(names, devices)
    return chosen


def _known(names: Sequence[str], devices: int) -> list[str]:
    """Patterns expanded, in the order given."""
    from autopar.errors import OptionError

    known = runner_names(devices)
    found = {name: [n for n in known if fnmatchcase(n, name)] for name in names}
    unknown = [name for name, matches in found.items() if not matches]
    if unknown:
        raise OptionError(
            f"no runner is called {', '.join(map(repr, unknown))}: there are {'; '.join(known)}"
        )
    return list(dict.fromkeys(n for matches in found.values() for n in matches))
