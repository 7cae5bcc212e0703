"""The matrix of models: captures, plans and verifies the zoo, and writes docs/models.md.

    python -m benchmarks.zoo                          # 31 models, three plans, float32 and float64
    python -m benchmarks.zoo --models gpt2 mamba      # a part: its rows replace older ones
    python -m benchmarks.zoo --resume                 # only what has not agreed yet
    python -m benchmarks.zoo --processes              # 4 real gloo processes, two stages of 2

Each model runs in a process of its own, so that a crash costs one row. Tiny models are not worth
sharding on a real machine, so the default cluster computes slowly and talks fast: its plans shard.
`--cluster cpu:1x4` plans for this machine instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from autopar.api import plan_model
from autopar.errors import AutoparError
from autopar.graph.capture import capture_graph
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.sharding.registry import RuleTable
from autopar.verify import KINDS, TOLERANCES, Errors, VerifyReport, verify_plan
from benchmarks import environment
from benchmarks.zoo_table import markdown
from cost_models import Cluster
from tests.zoo import ZOO

FAST_LINKS = environment.ROOT / "tests" / "clusters" / "fast_links.toml"
RESULTS = environment.ROOT / "benchmarks" / "results"
TABLE = environment.ROOT / "docs" / "models.md"
PLANS = {
    "the search's pick": SearchOptions(),
    "4 devices in one stage": SearchOptions(num_stages=1, num_microbatches=1),
    "2 stages of 2": SearchOptions(num_stages=2, mesh_shape=(2,), num_microbatches=2),
    "4 stages of 1": SearchOptions(num_stages=4, num_microbatches=4),
}
MATRIX = tuple(PLANS)[:3]

Cell = dict[str, Any]
Report = Callable[[Cell], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to do for one model. cells: (plan, dtype)."""

    model: str
    cells: tuple[tuple[str, str], ...]
    cluster: str
    processes: bool


def load_cluster(text: str) -> Cluster:
    """A cluster's text, or its TOML file."""
    return Cluster.from_toml(text) if text.endswith(".toml") else Cluster.parse(text)


def sharded_share(plan: ParallelPlan) -> float:
    """Share of operators that some mesh axis divides, in stages of several devices."""
    texts = [t for s in plan.stages if len(s.devices) > 1 for t in s.strategies.values()]
    return sum(any(f != "-" for f in t.split()) for t in texts) / max(1, len(texts))


def run_model(request: Request, report: Report) -> None:
    """All cells of one model, each reported as it begins (without "ok") and as it ends. Errors of
    autopar are rows too; anything else ends the process."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    factory, cluster = ZOO[request.model], load_cluster(request.cluster)
    report({"plan": "capture"})
    report(_capture(request.model))
    plans: dict[str, ParallelPlan] = {}
    for label, dtype in request.cells:
        key = {"plan": label, "dtype": dtype}
        report(key)
        start = time.perf_counter()
        module, batch = factory()
        try:
            if label not in plans:
                plans[label], _ = plan_model(module, batch, cluster, options=PLANS[label])
            checked = verify_plan(
                module,
                batch,
                plans[label],
                dtype=dtype,
                processes=factory if request.processes else None,
                eager=not request.processes,
            )
            row = _verified(plans[label], checked)
        except AutoparError as error:
            row = {"ok": False, "reason": str(error)}
        report({**key, **row, "seconds": time.perf_counter() - start})


def _capture(model: str) -> Cell:
    start = time.perf_counter()
    module, batch = ZOO[model]()
    try:
        graph = capture_graph(module, batch)
    except AutoparError as error:
        return {"plan": "capture", "ok": False, "reason": str(error)}
    return {
        "plan": "capture",
        "ok": True,
        "seconds": time.perf_counter() - start,
        "operators": len(graph.operators),
        "parameters": sum(p.numel() for p in module.parameters()),
        "fallbacks": sorted(set(RuleTable(graph).fallbacks.values())),
    }


def _verified(plan: ParallelPlan, report: VerifyReport) -> Cell:
    errors = report.errors
    row = {
        "ok": report.agrees,
        "eager_ok": report.agrees_with_eager,
        "meshes": "; ".join("x".join(map(str, s.axis_sizes)) for s in plan.stages),
        "microbatches": plan.num_microbatches,
        "sharded": sharded_share(plan),
        "loss": errors.loss,
        "gradient": errors.gradient,
        "update": errors.update,
        "buffer": errors.buffer,
        "eager": None if report.eager is None else report.eager.largest,
        "dropout": report.dropout,
    }
    too_large = _too_large("one device", errors, report.limits)
    if report.eager is not None:
        too_large += _too_large("eager", report.eager, dict.fromkeys(KINDS, report.eager_tolerance))
    if too_large:
        row["reason"] = "; ".join(too_large)
    return row


def _too_large(against: str, errors: Errors, limits: Mapping[str, float]) -> list[str]:
    return [
        f"{kind} {value:.2e} against {against}, in {errors.worst.get(kind) or 'the loss'}"
        for kind, limit in limits.items()
        if (value := getattr(errors, kind)) > limit
    ]


def _child(pipe: Connection, run: Callable[[Request, Report], None], request: Request) -> None:
    run(request, pipe.send)


def cells_of(
    request: Request, timeout_s: float, run: Callable[[Request, Report], None] = run_model
) -> Iterator[Cell]:
    """The finished cells of a model, from a process of its own. One that dies, or says nothing for
    `timeout_s`, leaves a cell with the reason."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, run, request))
    process.start()
    theirs.close()
    begun: Cell = {"plan": "start"}
    try:
        while ours.poll(timeout_s):
            try:
                cell = ours.recv()
            except EOFError:
                break
            begun = {} if "ok" in cell else cell
            if "ok" in cell:
                yield cell
        else:
            yield {**begun, "ok": False, "reason": f"no answer in {timeout_s:.0f} s"}
            process.kill()
            return
        process.join()
        if process.exitcode:
            reason = f"the process ended with code {process.exitcode}"
            yield {**begun, "ok": False, "reason": reason}
    finally:
        process.kill()
        process.join()
        ours.close()


def merge(record: dict[str, Any], model: str, cell: Cell) -> None:
    """Puts a cell into the record, in the place of an older one of the same plan and dtype."""
    rows: list[Cell] = record["models"].setdefault(model, [])
    key = (cell.get("plan"), cell.get("dtype"))
    rows[:] = [r for r in rows if (r.get("plan"), r.get("dtype")) != key]
    rows.append({**cell, "commit": record["commit"]})


def wanted(
    record: Mapping[str, Any],
    model: str,
    labels: Sequence[str],
    dtypes: Sequence[str],
    resume: bool,
) -> tuple[tuple[str, str], ...]:
    """The cells to run; with resume only those that have not agreed."""
    rows = record["models"].get(model, [])
    done = {(r.get("plan"), r.get("dtype")) for r in rows if r["ok"] and resume}
    return tuple((a, d) for a in labels for d in dtypes if (a, d) not in done)


def run_matrix(
    record: dict[str, Any],
    requests: Sequence[Request],
    *,
    jobs: int,
    timeout_s: float,
    save: Callable[[], None],
) -> None:
    """Runs the requests, `jobs` at a time. Each cell is merged and saved as it comes, so that an
    interrupted run goes on with `--resume`."""
    lock = Lock()

    def one(request: Request) -> tuple[str, list[bool]]:
        good = []
        for cell in cells_of(request, timeout_s):
            good.append(cell["ok"])
            with lock:
                merge(record, request.model, cell)
                save()
                print(f"{request.model}: {_line(cell)}", flush=True)
        return request.model, good

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(one, request) for request in requests]
        for number, future in enumerate(as_completed(running), start=1):
            model, good = future.result()
            print(
                f"[{number}/{len(requests)}] {model}: {sum(good)} of {len(good)} good", flush=True
            )


def _line(cell: Cell) -> str:
    errors = [f"{k} {cell[k]:.1e}" for k in KINDS if k in cell]
    word = "ok" if cell["ok"] else "FAILED"
    word += "" if cell.get("eager_ok", True) else ", BUT NOT AGAINST EAGER"
    parts = [cell["plan"], cell.get("dtype", ""), word, *errors]
    return " ".join([*filter(None, parts), cell.get("reason", "")[:400]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(ZOO), choices=list(ZOO), metavar="NAME")
    parser.add_argument("--plans", nargs="*", choices=list(PLANS), metavar="PLAN")
    parser.add_argument("--dtypes", nargs="*", default=list(TOLERANCES), choices=list(TOLERANCES))
    parser.add_argument("--cluster", default=str(FAST_LINKS), help="text or TOML file")
    parser.add_argument("--processes", action="store_true", help="4 real gloo processes")
    parser.add_argument("--resume", action="store_true", help="skip cells that agreed before")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of silence")
    parser.add_argument("--out", type=Path, help="JSON; by default in benchmarks/results")
    arguments = parser.parse_args()
    kind = "processes" if arguments.processes else "virtual"
    path: Path = arguments.out or RESULTS / f"zoo-{kind}.json"
    record: dict[str, Any] = {"models": {}}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    record.update(
        commit=environment.commit(),
        command=" ".join(["python -m benchmarks.zoo", *sys.argv[1:]]),
        versions=environment.versions(),
        hardware=environment.hardware(),
        kind=kind,
    )
    labels = arguments.plans or (MATRIX if not arguments.processes else ("2 stages of 2",))
    requests = []
    for model in arguments.models:
        cells = wanted(record, model, labels, arguments.dtypes, arguments.resume)
        if cells:
            requests.append(Request(model, cells, arguments.cluster, arguments.processes))

    def save() -> None:
        record["models"] = {
            name: record["models"][name] for name in ZOO if name in record["models"]
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if arguments.out is None and not arguments.processes:
            TABLE.write_text(markdown(record), encoding="utf-8")

    run_matrix(record, requests, jobs=arguments.jobs, timeout_s=arguments.timeout, save=save)
    save()
    if not all(cell["ok"] for m in arguments.models for cell in record["models"].get(m, [])):
        sys.exit(1)


if __name__ == "__main__":
    main()
