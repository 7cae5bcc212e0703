"""Verifies the eight small models of tests/zoo.py under four plans each.

    python -m benchmarks.verify_zoo                 # virtual mesh, float32 and float64
    python -m benchmarks.verify_zoo --processes     # 4 real gloo processes, two stages of 2

The plans: 4 devices in one stage, 4 stages of 1, 2 stages of 2, and the search's own pick. Tiny
models are not worth sharding on a real machine, so the default cluster computes slowly and talks
fast: its plans shard. `--cluster cpu:1x4` plans for this machine instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from autopar.api import plan_model
from autopar.errors import AutoparError
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.verify import TOLERANCES, verify_plan
from cost_models import Cluster
from tests.zoo import ZOO

RESULTS = Path(__file__).parent / "results"
FAST_LINKS = Path(__file__).parent.parent / "tests" / "clusters" / "fast_links.toml"
PLANS = {
    "4 devices in one stage": SearchOptions(num_stages=1, num_microbatches=1),
    "4 stages of 1": SearchOptions(num_stages=4, num_microbatches=4),
    "2 stages of 2": SearchOptions(num_stages=2, mesh_shape=(2,), num_microbatches=2),
    "the search's pick": SearchOptions(),
}


def sharded_share(plan: ParallelPlan) -> float:
    """Share of operators that some mesh axis divides, in stages of several devices."""
    texts = [t for s in plan.stages if len(s.devices) > 1 for t in s.strategies.values()]
    return sum(any(f != "-" for f in t.split()) for t in texts) / max(1, len(texts))


def row(model: str, label: str, cluster: Cluster, dtype: str, processes: bool) -> dict[str, Any]:
    """One verification; an error is a row too."""
    start = time.perf_counter()
    module, batch = ZOO[model]()
    try:
        plan, _ = plan_model(module, batch, cluster, options=PLANS[label])
        report = verify_plan(
            module,
            batch,
            plan,
            dtype=dtype,
            processes=ZOO[model] if processes else None,
            eager=not processes,
        )
    except AutoparError as error:
        return {"model": model, "plan": label, "dtype": dtype, "ok": False, "error": str(error)}
    return {
        "model": model,
        "plan": label,
        "dtype": dtype,
        "ok": report.ok,
        "meshes": "; ".join("x".join(map(str, s.axis_sizes)) for s in plan.stages),
        "sharded": sharded_share(plan),
        "loss": report.errors.loss,
        "gradient": report.errors.gradient,
        "update": report.errors.update,
        "buffer": report.errors.buffer,
        "eager": None if report.eager is None else report.eager.largest,
        "dropout": report.dropout,
        "seconds": time.perf_counter() - start,
    }


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    good = sum(r["ok"] for r in rows)
    lines = [
        "# Verification of the small models",
        "",
        f"- machine: {platform.machine()}, 2 cores; torch {torch.__version__}",
        f"- commit: {commit}; date: {datetime.now():%Y-%m-%d}",
        f"- command: `python -m benchmarks.verify_zoo {' '.join(sys.argv[1:])}`",
        f"- relative errors (autopar/verify.py); tolerances {TOLERANCES}; eager: the user's own "
        "model, dropout 0, at float32's tolerance",
        f"- **{good} of {len(rows)} agree**",
        "",
        "| model | plan | dtype | meshes | operators sharded | loss | gradients | updates "
        "| buffers | eager | dropout | agrees | s |",
        "|---" * 13 + "|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | {r['plan']} | {r['dtype']} | {r['error']} |")
            continue
        eager = "-" if r["eager"] is None else f"{r['eager']:.1e}"
        errors = " | ".join(f"{r[k]:.1e}" for k in ("loss", "gradient", "update", "buffer"))
        cells = [r["model"], r["plan"], r["dtype"], r["meshes"], f"{r['sharded']:.0%}", errors]
        cells += [eager, "on" if r["dropout"] else "-", "yes" if r["ok"] else "NO"]
        lines.append(f"| {' | '.join(cells)} | {r['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default=str(FAST_LINKS), help="text or TOML file")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(ZOO), choices=list(ZOO))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    named = arguments.cluster.endswith(".toml")
    cluster = (Cluster.from_toml if named else Cluster.parse)(arguments.cluster)
    labels = ["2 stages of 2"] if arguments.processes else list(PLANS)
    rows = []
    for model in arguments.models:
        for label in labels:
            for dtype in TOLERANCES:
                rows.append(row(model, label, cluster, dtype, arguments.processes))
                print(rows[-1], flush=True)
    text = table(rows, arguments)
    kind = "processes" if arguments.processes else "virtual"
    stem = f"verify-{kind}-{datetime.now():%Y%m%d}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.md").write_text(text)
    (arguments.out / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)
    if not all(r["ok"] for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
