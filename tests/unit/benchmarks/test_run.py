"""The harness with a measurement that costs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import OptionError
from benchmarks.baselines import blocks
from benchmarks.models import MODELS
from benchmarks.plan_suite import PassClock
from benchmarks.run import default_path, run_suite
from benchmarks.suites import HF_GPT2, PLAN_CASES, SPEED_CASES, SUITES, select
from benchmarks.summary import summary


class Measurement:
    """Counts calls; fails for the cases that it is told to fail for."""

    def __init__(self, *failing: str) -> None:
        self.failing = set(failing)
        self.calls: list[str] = []

    def __call__(self, case: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(case.name)
        if case.name in self.failing:
            raise RuntimeError("out of memory\nsecond line")
        return {
            "cluster": case.cluster,
            "batch": case.batch,
            "plan_s": summary([1.0, 2.0, 4.0]).to_dict(),
            "passes_s": {"capture": 0.5},
            "rss_bytes": 2**30,
            "predicted_step_s": 0.01,
            "gap": 0.0,
            "plan": "Plan of ...",
        }


CASES = "gpt2-124m,gpt-tiny"
SETTINGS = {"repeats": 3}


def test_a_run_writes_json_and_markdown_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    outcome = run_suite("plan", cases=CASES, settings=SETTINGS, path=path, measure=Measurement())
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"commit", "command", "versions", "hardware", "date"} <= set(record)
    assert [e["case"] for e in record["entries"]] == ["gpt2-124m", "gpt-tiny"]
    assert "| gpt2-124m | h100:1x8 | 64 | 2.00 s | 1.00 s - 4.00 s |" in outcome.markdown
    assert path.with_suffix(".md").read_text(encoding="utf-8") == outcome.markdown
    assert outcome.num_failed == 0


def test_a_failure_is_recorded_and_the_run_goes_on_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    first = Measurement("gpt2-124m")
    outcome = run_suite("plan", cases=CASES, settings=SETTINGS, path=path, measure=first)
    assert outcome.num_failed == 1
    assert "- gpt2-124m: RuntimeError: out of memory\n" in outcome.markdown
    second = Measurement()
    outcome = run_suite("plan", cases=CASES, settings=SETTINGS, path=path, measure=second)
    assert (first.calls, second.calls) == (["gpt2-124m", "gpt-tiny"], ["gpt2-124m"])
    assert outcome.num_failed == 0
    assert len(outcome.record["entries"]) == 2


def test_other_settings_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    again = Measurement()
    run_suite("plan", cases="gpt-tiny", settings=SETTINGS, path=path, measure=Measurement())
    run_suite("plan", cases="gpt-tiny", settings={"repeats": 5}, path=path, measure=again)
    assert again.calls == ["gpt-tiny"]


def test_result_files_name_suite_day_and_machine() -> None:
    name = default_path("speed").name
    assert name.startswith("speed-20")
    assert name.endswith(".json")


def test_cases_have_known_models_and_unique_names() -> None:
    for cases in SUITES.values():
        assert len({case.name for case in cases}) == len(cases)
    assert {case.model for case in SPEED_CASES} <= set(MODELS)
    assert {case.model for case in PLAN_CASES} <= {*MODELS, HF_GPT2}


def test_unknown_cases_are_errors_that_list_what_there_is() -> None:
    with pytest.raises(OptionError, match="no case 'nope': it has gpt2-124m"):
        select("plan", "gpt-tiny,nope")
    assert [case.name for case in select("plan", "all")] == [case.name for case in PLAN_CASES]


def test_passes_are_told_apart_by_their_messages() -> None:
    clock = PassClock()
    for text in ("capture, 1 microbatch(es)", "layers", "layer points 2x4, layer class 3", "hm"):
        clock(text)
    clock("end")
    assert list(clock.seconds) == ["capture", "layers", "layer points", "other"]


def test_quartiles() -> None:
    times = summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (times.median, times.q1, times.q3, times.iqr) == (3.0, 2.0, 4.0, 2.0)
    assert (times.minimum, times.maximum, times.count) == (1.0, 5.0, 5)


def test_fsdp_wraps_the_blocks() -> None:
    assert len(blocks(MODELS["gpt-tiny"].build())) == 4
