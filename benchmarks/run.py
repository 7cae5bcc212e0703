"""Runs a suite: one JSON file per run, and the same as markdown beside it.

The JSON is written after every case, so that a run that was stopped goes on where it was: a case
that succeeded at this commit under these settings is not measured again. A case that fails is
recorded with its error, and the run goes on.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.report.console import stderr_console
from autopar.report.units import seconds_text
from benchmarks import environment, plan_suite, speed, tables
from benchmarks.suites import Case, select

RESULTS = Path(__file__).resolve().parent / "results"
_LOG = logging.getLogger(__name__)

Record = dict[str, Any]
Measure = Callable[[Case, Mapping[str, Any]], Record]
_MEASURES: Mapping[str, Measure] = {"plan": plan_suite.measure, "speed": speed.measure}


@dataclass(frozen=True, slots=True)
class Outcome:
    """record: what the JSON file holds. markdown: the same for people."""

    path: Path
    record: Record
    markdown: str
    num_failed: int


def run_suite(
    suite: str,
    *,
    cases: str = "all",
    settings: Mapping[str, Any],
    path: Path | None = None,
    measure: Measure | None = None,
) -> Outcome:
    """Measures the cases. path: of the JSON file; by default one for suite, day and machine.

    measure: of one case; the suite's own by default.
    """
    chosen = select(suite, cases)
    path = path or default_path(suite)
    entries = _load(path)
    commit = environment.commit()
    record = _header(suite, entries, commit)
    for case in chosen:
        key = (case.name, commit, dict(settings))
        if any(_key(entry) == key and entry["status"] == "ok" for entry in entries):
            _say(f"{suite} {case.name}: done before")
            continue
        entries[:] = [entry for entry in entries if _key(entry) != key]
        entries.append(_measured(case, commit, settings, measure or _MEASURES[suite]))
        _save(path, record)
    markdown = tables.markdown(record)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    names = {case.name for case in chosen}
    failed = [e for e in entries if e["case"] in names and e["status"] != "ok"]
    return Outcome(path, record, markdown, len(failed))


def default_path(suite: str) -> Path:
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return RESULTS / f"{suite}-{day}-{environment.machine()}.json"


def _measured(case: Case, commit: str, settings: Mapping[str, Any], measure: Measure) -> Record:
    _say(f"{case.name}: measuring")
    started = time.monotonic()
    entry: Record = {"case": case.name, "commit": commit, "settings": dict(settings)}
    try:
        entry["result"] = measure(case, settings)
        entry["status"] = "ok"
    except Exception as error:  # one case must not end the run
        _LOG.info("%s failed", case.name, exc_info=True)
        entry["status"] = "failed"
        entry["error"] = f"{type(error).__name__}: {error}"
        entry["traceback"] = traceback.format_exc()
    entry["seconds"] = round(time.monotonic() - started, 2)
    _say(f"{case.name}: {entry['status']} after {seconds_text(entry['seconds'])}")
    return entry


def _header(suite: str, entries: list[Record], commit: str) -> Record:
    return {
        "format": "autopar-benchmark",
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": " ".join(["autopar", *sys.argv[1:]]),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "entries": entries,
    }


def _key(entry: Record) -> tuple[str, str, dict[str, Any]]:
    return entry["case"], entry["commit"], entry["settings"]


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
