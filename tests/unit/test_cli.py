from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopar.cli import main
from autopar.plan import ParallelPlan
from tests.unit.report.plans import hand_plan

SMALL = ["--cluster", "cpu:1x2", "--microbatches", "2", "--mesh", "1", "--stages", "2"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    hand_plan().save(path)
    return path


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from autopar.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "verify" in done.stdout
    assert time.monotonic() - started < 5  # 0.5 s on an idle machine


@pytest.mark.parametrize(
    "command",
    ["plan", "show", "explain", "diff", "simulate", "coverage", "verify", "run", "bench"],
)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "plan", "--help"] if command == "bench" else [command, "--help"]
    assert main(arguments) == 0
    assert "Example" in capsys.readouterr().out


def test_coverage_of_a_named_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "dlrm", "--cluster", "cpu:1x4"]) == 0
    shown = capsys.readouterr().out
    assert "contraction" in shown and "dlrm on cpu:1x4: 100.0 % of the FLOPs" in shown
    assert main(["coverage", "dlrm", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sharded_flops_share"] == 1.0 and record["cluster"] is None


def test_show_prints_the_tree(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(plan_file)]) == 0
    assert "Stage 1: model.h.3 .. 5, last" in capsys.readouterr().out


def test_show_draws_the_schedule(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(plan_file), "--schedule"]) == 0
    assert capsys.readouterr().out.startswith("stage 0  F0")


def test_show_lists_operators(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(plan_file), "--operators", "bmm"]) == 0
    assert "1 of 11 operators" in capsys.readouterr().out


def test_diff_and_simulate_a_saved_plan(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(plan_file), str(plan_file)]) == 0
    assert "decide the same" in capsys.readouterr().out
    assert main(["diff", str(plan_file), str(plan_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_graph"]
    trace = tmp_path / "trace.json"
    what_if = [str(plan_file), "--schedule", "gpipe", "--microbatches", "8"]
    assert main(["simulate", *what_if, "--trace", str(trace)]) == 0
    assert "2 times the rows" in capsys.readouterr().out
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert main(["simulate", *what_if, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_microbatches"] == 8
    assert main(["simulate", *what_if, "--trace", "/no/such/folder/trace.json"]) == 2


def test_json_is_the_plan_and_nothing_else(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(plan_file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert ParallelPlan.from_json(record) == ParallelPlan.load(plan_file)


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "/no/such/plan.json"],
        ["plan", "gpt-tiny", "--cluster", "h999:1x8"],
        ["plan", "gpt-tiny"],
        ["plan", "gpt-tiny", "--cluster", "cpu:1x2", "--mesh", "2by4"],
        ["plan", "gpt-tiny", "--cluster", "cpu:1x2", "--place", "nothing"],
        ["plan", "no-such-model", "--cluster", "cpu:1x2"],
        ["plan", "gpt-tiny", "--cluster", "no.toml"],
        ["plan", "gpt-tiny", "--cluster", "cpu:1x2", "-o", "/no/such/folder/plan.json"],
        ["plan", "gpt-tiny", "--cluster", "cpu:1x2", "--memory", "much"],
        ["bench", "plan", "--cases", "no-such-case"],
        ["frobnicate"],
    ],
)
def test_bad_input_is_one_panel_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("╭─") == 1
    assert "Traceback" not in captured.err


def test_an_error_under_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "/no/such/plan.json", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "PlanError"


def test_a_plan_leaves_nothing_to_search(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "gpt-tiny", "--plan", str(plan_file), "--stages", "2"]) == 2
    assert "--stages" in capsys.readouterr().err


def test_interruption_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ParallelPlan, "load", interrupt)
    assert main(["show", str(plan_file)]) == 130


_SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from autopar.search.exact import ExactSolver

solve, fastest, solved = ExactSolver.solve, ExactSolver.fastest, []

def counted(*arguments, **options):
    solved.append(solve(*arguments, **options))
    return solved[-1]

def slow(*arguments, **options):
    if solved:
        print("SLOW", file=sys.stderr, flush=True)
        time.sleep(60)
    return fastest(*arguments, **options)

ExactSolver.solve, ExactSolver.fastest = counted, slow
from autopar.cli import main
sys.exit(main(sys.argv[1:]))
"""
_SEVERAL_CUTS = ["gpt-tiny", "--cluster", "h100:1x2", "--microbatches", "2", "--no-cache"]


def test_ctrl_c_gives_the_best_plan_so_far(tmp_path: Path) -> None:
    """A search that is slow once it has a plan, and a real signal."""
    path = tmp_path / "plan.json"
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, "plan", *_SEVERAL_CUTS, "-o", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == "SLOW":
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "interrupted: the best plan so far" in " ".join(out.split())
    assert ParallelPlan.load(path).search.notes


def test_ctrl_c_before_any_plan_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autopar.search.exact.ExactSolver.solve", interrupt)
    path = tmp_path / "plan.json"
    assert main(["plan", *_SEVERAL_CUTS, "-o", str(path)]) == 130
    assert "Interrupted before there was any plan." in capsys.readouterr().err
    assert not path.exists()


def test_plan_then_verify_then_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.json"
    assert main(["plan", "gpt-tiny", *SMALL, "-o", str(path)]) == 0
    assert "blocks.*.up.{weight,bias}" in capsys.readouterr().out
    plan = ParallelPlan.load(path)
    assert (len(plan.stages), plan.num_microbatches) == (2, 2)
    assert main(["explain", "gpt-tiny", "--plan", str(path)]) == 0
    assert "forward compute" in capsys.readouterr().out
    assert main(["explain", "gpt-tiny", "head.weight", "--plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"][0]["name"] == "head.weight"
    assert main(["verify", "gpt-tiny", "--plan", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"]
    assert record["errors"]["gradient"] <= 1e-5


def test_run_trains_on_one_local_device(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "gpt-tiny", "--cluster", "cpu:1x1", "--steps", "3", "--json"]
    assert main(arguments) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_models_lists_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    assert "gpt-1.3b" in json.loads(capsys.readouterr().out)
