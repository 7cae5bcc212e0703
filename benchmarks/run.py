"""Runs a suite: one JSON file per run, and the same as markdown beside it.

    python -m benchmarks.run speed --cases llama-8l,gpt-1.3b --backend nccl --pairs --minutes 9

The JSON is written after every case, and after every runner of one, so that a run that was stopped
goes on where it was: a case that succeeded at this commit under these settings is not measured
again. A case that fails is recorded with its error, and the run goes on. On a machine with more
GPUs than a case needs cases run side by side, each on GPUs of its own, which the result names.
Runs that share GPUs take turns on them, and prepare side by side, if all have the same --turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autopar.report.console import stderr_console
from autopar.report.units import seconds_text
from benchmarks import environment, plan_suite, speed, tables
from benchmarks.suites import Case, PlanCase, select

RESULTS = Path(__file__).resolve().parent / "results"
_LOG = logging.getLogger(__name__)

Record = dict[str, Any]
Measure = Callable[..., Record]  # (case, settings), for speed also (.., place, note)


@dataclass(frozen=True, slots=True)
class Outcome:
    """record: what the JSON file holds. markdown: the same for people."""

    path: Path
    record: Record
    markdown: str
    num_failed: int


@dataclass(slots=True)
class _File:
    """The results as they come, from several threads."""

    path: Path
    record: Record
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, entry: Record) -> None:
        """In place of what was there of the same case under the same settings."""
        with self.lock:
            entries = self.record["entries"]
            entries[:] = [old for old in entries if _key(old) != _key(entry)] + [entry]
            _save(self.path, self.record)


def run_suite(
    suite: str,
    *,
    cases: str = "all",
    settings: Mapping[str, Any],
    path: Path | None = None,
    measure: Measure | None = None,
    places: Sequence[speed.Place] = (speed.Place(),),
) -> Outcome:
    """Measures the cases. path: of the JSON file; by default one for suite, day and machine.

    measure: of one case; the suite's own by default. places: one for each case at a time.
    """
    chosen = select(suite, cases)
    path = path or default_path(suite)
    commit = environment.commit()
    file = _File(path, _header(suite, _load(path), commit))
    done = {_text(_key(e)) for e in file.record["entries"] if e["status"] == "ok"}
    stop = threading.Event()
    free: queue.SimpleQueue[speed.Place] = queue.SimpleQueue()
    for place in places:
        free.put(replace(place, stop=stop))

    def run(case: Case) -> None:
        if _text((case.name, commit, dict(settings))) in done:
            _say(f"{suite} {case.name}: done before")
            return
        place = free.get()
        try:
            if not stop.is_set():
                _measure(case, commit, settings, measure, place, file)
        finally:
            free.put(place)

    try:
        with ThreadPoolExecutor(len(places)) as pool:
            running = [pool.submit(run, case) for case in chosen]
            try:
                for future in running:
                    future.result()
            except KeyboardInterrupt:
                stop.set()
                raise
    finally:
        markdown = tables.markdown(file.record)
        path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    names = {case.name for case in chosen}
    entries = file.record["entries"]
    failed = [e for e in entries if e["case"] in names and e["status"] != "ok"]
    return Outcome(path, file.record, markdown, len(failed))


def default_path(suite: str) -> Path:
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return RESULTS / f"{suite}-{day}-{environment.machine()}.json"


def _measure(
    case: Case,
    commit: str,
    settings: Mapping[str, Any],
    measure: Measure | None,
    place: speed.Place,
    file: _File,
) -> None:
    _say(f"{case.name}: measuring")
    started = time.monotonic()
    entry: Record = {"case": case.name, "commit": commit, "settings": dict(settings)}

    def note(result: Record) -> None:
        ended = list(result["runners"])
        _say(f"{case.name}: {ended[-1]}: {tables.runner_text(result['runners'][ended[-1]])}")
        file.put({**entry, "result": result, "status": "stopped"})

    try:
        if measure is not None:
            entry["result"] = measure(case, settings)
        elif isinstance(case, PlanCase):
            entry["result"] = plan_suite.measure(case, settings)
        else:
            entry["result"] = speed.measure(case, settings, place, note)
        entry["status"] = "ok" if entry["result"].get("complete", True) else "stopped"
    except Exception as error:  # one case must not end the run
        _LOG.info("%s failed", case.name, exc_info=True)
        entry["status"] = "failed"
        entry["error"] = f"{type(error).__name__}: {error}"
        entry["traceback"] = traceback.format_exc()
    entry["seconds"] = round(time.monotonic() - started, 2)
    file.put(entry)
    _say(f"{case.name}: {entry['status']} after {seconds_text(entry['seconds'])}")


def _header(suite: str, entries: list[Record], commit: str) -> Record:
    return {
        "format": "autopar-benchmark",
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": " ".join([_program(), *sys.argv[1:]]),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "entries": entries,
    }


def _program() -> str:
    return "python -m benchmarks.run" if Path(sys.argv[0]).name == "run.py" else "autopar"


def _key(entry: Record) -> tuple[str, str, dict[str, Any]]:
    return entry["case"], entry["commit"], entry["settings"]


def _text(key: tuple[str, str, dict[str, Any]]) -> str:
    return json.dumps(key, sort_keys=True)


def _load(path: Path) -> list[Record]:
    if not path.exists():
        return []
    entries: list[Record] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return entries


def _save(path: Path, record: Record) -> None:
    """Whole or not at all: a stopped run leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _say(text: str) -> None:
    stderr_console().print(text)


def side_by_side(
    gpus: int,
    devices: int,
    *,
    minutes: float | None = None,
    traces: Path | None = None,
    turns: Path | None = None,
) -> list[speed.Place]:
    """As many places as there are groups of `devices` GPUs; one that may see all where there are
    none."""
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    groups: list[tuple[int, ...] | None] = [
        tuple(range(first, first + devices)) for first in range(0, gpus - devices + 1, devices)
    ]
    return [speed.Place(group, until, traces, turns) for group in groups or [None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("speed",))
    parser.add_argument("--cases", default="all", help="comma-separated names, or all")
    parser.add_argument(
        "--runners", default="", help="names or patterns, separated by semicolons; all if empty"
    )
    parser.add_argument("--devices", type=int, default=2, help="of each case")
    parser.add_argument("--backend", choices=tuple(speed.PRECISIONS), default="nccl")
    parser.add_argument("--steps", type=int, default=20, help="measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before, one or more")
    parser.add_argument("--pairs", action="store_true", help="cases side by side, on own GPUs")
    parser.add_argument("--minutes", type=float, help="of all; what is left then is not run")
    parser.add_argument("--runner-seconds", type=float, default=speed.RUNNER_LIMIT_S)
    parser.add_argument("--traces", type=Path, help="folder for profiles")
    parser.add_argument("--turns", type=Path, help="lock file of runs that share the GPUs")
    parser.add_argument("--results", type=Path, help="JSON file to continue")
    args = parser.parse_args()
    gpus = environment.num_gpus() if args.pairs else 0
    path = args.results or default_path(args.suite)
    try:
        run_suite(
            args.suite,
            cases=args.cases,
            settings=speed.settings(
                devices=args.devices,
                backend=args.backend,
                steps=args.steps,
                warmup=args.warmup,
                runners=args.runners,
                runner_limit_s=args.runner_seconds,
            ),
            path=path,
            places=side_by_side(
                gpus, args.devices, minutes=args.minutes, traces=args.traces, turns=args.turns
            ),
        )
    finally:
        if path.exists():
            print(tables.short(json.loads(path.read_text(encoding="utf-8"))))
            print(f"Results: {path}")


if __name__ == "__main__":
    main()
