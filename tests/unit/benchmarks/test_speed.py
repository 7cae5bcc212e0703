"""The comparison of runners, and jobs that fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from autopar.errors import OptionError
from benchmarks import speed, tables
from benchmarks.baselines import BASELINES
from benchmarks.models import MODELS
from benchmarks.run import side_by_side
from benchmarks.runners import FORCED, WAYS, names
from benchmarks.suites import SPEED_CASES, TWINS, select

H100 = 989.4e12
# Writes what two runners gave, and fails, or hangs, in the third.
JOB = """
import json, pathlib, sys, time
request, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
rank = {"step_s": {"median": 1.0}, "peak_flops": None}
for number, name in enumerate(request["runners"]):
    if name == "zero-2":
        (folder / "error-1.txt").write_text("OutOfMemoryError: 3 GiB")
        (folder / "error-0.txt").write_text("RuntimeError: peer")
        sys.exit("no memory")
    if name == "zero-3":
        sys.exit("Timeout (0:07:00)!")
    if name == "1f1b":
        time.sleep(60)
    (folder / "draft").write_text(json.dumps({name: rank}))
    (folder / "draft").replace(folder / f"done-{number:03d}.json")
"""


def _runner(median_s: float, **more: Any) -> dict[str, Any]:
    return {"step_s": {"median": median_s}, "peak_flops": H100, **more}


def test_mfu_is_that_of_a_calculation_by_hand() -> None:
    # GPT-1.3B: 12 x 24 x 2048^2 + 2048 x 51200 = 1,312,817,152 weights of matmuls; 32 x 1024 tokens
    tokens = 32 * 1024
    flops = tokens * (6 * 1_312_817_152 + 6 * 24 * 1024 * 2048)
    assert MODELS["gpt-1.3b"].model_flops_per_sample() * 32 == flops
    assert speed.mfu(flops, 0.2738, 2, H100) == pytest.approx(0.49466, rel=1e-3)


def test_llama_rows_have_the_shapes_of_llama_3_8b() -> None:
    # 2 x 4096 x (4096 + 1024) + 3 x 4096 x 14336 weights a layer, and the head
    for name, layers in (("llama-8l", 8), ("llama-24l", 24)):
        weights = layers * (2 * 4096 * 5120 + 3 * 4096 * 14336) + 4096 * 128256
        per_token = 6 * weights + 6 * layers * 4096 * 4096
        assert MODELS[name].model_flops_per_sample() == 4096 * per_token


def test_runners_are_compared_with_the_best_baseline() -> None:
    runners = {
        "autopar": _runner(0.50),
        "autopar: zero-2": _runner(0.49),
        "autopar: without CUDA graphs": _runner(0.1),  # no plan of its own
        "zero-2": _runner(0.55),
        "ddp": _runner(1.1),
        "1f1b": {"error": "not available"},
    }
    found = speed.compared(runners, per_step=1000, flops=H100 * 0.22, devices=2)
    assert (found["best_baseline"], found["fastest_plan"]) == ("zero-2", "autopar: zero-2")
    assert found["pick_is_close"] is True
    ours = found["runners"]["autopar"]
    assert (ours["items_per_s"], ours["ratio"]) == (2000, pytest.approx(1.1))
    assert ours["mfu"] == pytest.approx(0.22)
    assert found["runners"]["1f1b"] == {"error": "not available"}
    runners["autopar: zero-2"] = _runner(0.48)
    slower = speed.compared(runners, per_step=1, flops=1.0, devices=2)
    assert slower["pick_is_close"] is False
    alone = speed.compared({"autopar": _runner(1.0)}, per_step=1, flops=1.0, devices=2)
    assert alone["pick_is_close"] is None
    assert alone["runners"]["autopar"]["ratio"] is None


def _measure(monkeypatch: pytest.MonkeyPatch, runners: str, until: float) -> Mapping[str, Any]:
    monkeypatch.setattr(speed, "_command", lambda request: [sys.executable, "-c", JOB])
    monkeypatch.setattr(speed, "_POLL_S", 0.05)
    (case,) = select("speed", "gpt-tiny")
    settings = speed.settings(devices=2, backend="gloo", steps=1, warmup=1, runners=runners)
    notes: list[dict[str, Any]] = []
    found = speed.measure(case, settings, speed.Place(until=until), notes.append)
    assert notes[-1]["runners"].keys() <= found["runners"].keys()
    return found


def test_jobs_go_on_after_runners_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _measure(monkeypatch, "ddp; zero-2; zero-3; autopar", float("inf"))
    found = result["runners"]
    assert result["complete"]
    assert list(found) == ["ddp", "zero-2", "zero-3", "autopar"]
    assert found["zero-2"]["error"] == "OutOfMemoryError: 3 GiB"
    assert found["zero-2"]["stderr"] == "no memory\n"
    assert found["zero-3"]["error"] == "no end after 420 s"
    assert found["autopar"]["ratio"] == found["ddp"]["ratio"] == 1.0


def test_what_the_time_does_not_allow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    result = _measure(monkeypatch, "ddp; 1f1b; autopar", started + 2.0)
    found = result["runners"]
    assert not result["complete"]
    assert found["1f1b"]["error"] == "not run to its end: the time was over"
    assert found["autopar"]["error"] == "not run: the time was over"
    assert time.monotonic() - started < 30


def test_names_of_runners_are_checked() -> None:
    with pytest.raises(OptionError, match="no runner is called 'zero-4': there are autopar; ddp"):
        speed.settings(devices=2, backend="gloo", steps=1, warmup=1, runners="zero-4")
    chosen = speed.settings(
        devices=2, backend="gloo", steps=1, warmup=0, runners="zero-2*; autopar"
    )
    assert chosen["runners"] == ["zero-2", "zero-2, checkpointed", "autopar"]
    assert chosen["warmup"] == 1
    assert set(names(2)) == {
        "autopar",
        *(f"autopar: {name}" for name in (*FORCED, *WAYS)),
        *(name for name in BASELINES if not name.startswith("torch.compile")),
    }
    assert names(1) == ["autopar", "torch.compile", "torch.compile, reduce-overhead"]


def test_every_row_has_a_twin_for_the_cpu() -> None:
    rows = {case.name: case for case in SPEED_CASES}
    for case in SPEED_CASES:
        twin = rows[TWINS[case.model.split("-")[0]]]
        assert type(MODELS[twin.model].build()) is type(_on_meta(case.model))


def _on_meta(model: str) -> Any:
    import torch

    with torch.device("meta"):
        return MODELS[model].build()


def test_rows_side_by_side_have_gpus_of_their_own() -> None:
    assert [place.gpus for place in side_by_side(8, 2)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [place.gpus for place in side_by_side(3, 2)] == [(0, 1)]
    assert [place.gpus for place in side_by_side(0, 2)] == [None]


def test_a_case_says_whether_the_planner_chose_well() -> None:
    runners = {
        "autopar": {"step_s": {"median": 0.5}, "ratio": 1.1},
        "autopar: zero-2": {"step_s": {"median": 0.4}, "ratio": 1.375},
        "zero-2": {"step_s": {"median": 0.55}, "ratio": 1.0},
    }
    said = {"best_baseline": "zero-2", "fastest_plan": "autopar: zero-2", "pick_is_close": False}
    rows = tables._case_rows([{"case": "gpt", "result": {**said, "runners": runners}}])
    assert rows.splitlines()[-1] == (
        "| gpt | 500 ms | zero-2, 550 ms | 1.100 | autopar: zero-2, 400 ms | no |"
    )


def test_a_runner_is_one_line() -> None:
    text = tables.runner_text(
        {
            "step_s": {"median": 0.2738, "q1": 0.2734, "q3": 0.2742},
            "mfu": 0.49466,
            "peak_bytes": 37.2 * 2**30,
            "ratio": 1.0,
            "first_loss": 10.9,
            "last_loss": 10.1,
            "setup_s": 10.0,
            "first_step_s": 25.0,
            "profile": {"compute_ms": 250.0, "exposed_communication_ms": 20.0, "idle_ms": 3.5},
        }
    )
    assert text == (
        "273.8 ms +- 0.4, MFU 49.5 %, 37.2 GiB, x 1.000, loss 10.9000 -> 10.1000, ready after 35 s,"
        " compute 250.0, exposed communication 20.0, idle 3.5 ms"
    )
    assert tables.runner_text({"error": "OutOfMemoryError: 3 GiB\nmore"}) == (
        "OutOfMemoryError: 3 GiB"
    )
