"""Solve times of the intra-op solvers on captured layers, and that they agree.

    python -m benchmarks.solvers [--limit 60] [--out benchmarks/results]

Each instance is one block of a real-size model with its embedding and head, on one mesh of
h100:1x8, without a budget and at 90 % of the free optimum's bytes. The dual solver's answer is
compared with every backend that ended within the limit.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from autopar.errors import AutoparError
from autopar.estimate import MeshCosts
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.intraop.build import build_problem
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.solver import Solver, solve
from autopar.intraop.stage_problem import StageContext
from autopar.lowering.lower import prepare_stages
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from cost_models import Cluster

RESULTS = Path(__file__).parent / "results"
MESHES = ((8,), (2, 4))
BUDGETS = (None, 0.9)


def gpt2() -> tuple[torch.nn.Module, Any]:
    """GPT-2 124M with one block, 8 x 1024 tokens."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
        tokens = torch.zeros(8, 1024, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


def llama() -> tuple[torch.nn.Module, Any]:
    """Llama-3-8B shapes with one block, bf16, 8 x 2048 tokens."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(8, 2048, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
    "gpt2-124m": gpt2,
    "llama-3-8b": llama,
}


def instances() -> Iterator[tuple[str, IntraOpProblem]]:
    cluster = Cluster.parse("h100:1x8")
    for name, factory in MODELS.items():
        model, batch = factory()
        graph = cluster_layers(capture_graph(model.train(), batch))
        stage = prepare_stages(graph, Remat.NONE, [0])[0]
        for shape in MESHES:
            costs = MeshCosts(cluster, LogicalMesh(shape))
            problem = build_problem(stage.graph, stage.table, costs, StageContext()).problem
            free = solve(problem)
            for share in BUDGETS:
                label = f"{name}, 1 block, {'x'.join(map(str, shape))}"
                if share is not None:
                    label += f", {share:.0%} of the bytes"
                yield label, problem.with_budget(None if share is None else share * free.bytes)


def measure(problem: IntraOpProblem, solver: Solver, limit_s: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = solve(problem, solver=solver, time_limit_s=limit_s, target_gap=1e-6)
    except AutoparError as error:
        return {"seconds": time.perf_counter() - start, "error": str(error)}
    return {
        "seconds": time.perf_counter() - start,
        "objective_s": found.seconds,
        "bound_s": found.bound,
        "optimal": found.optimal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per solve")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    rows: dict[str, dict[str, Any]] = {}
    lines = [
        "# Intra-op solvers on captured layers",
        "",
        f"- machine: {platform.machine()}, 2 cores, one thread per solve; "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        f"- commit: {commit}; date: {datetime.now():%Y-%m-%d}",
        f"- command: `python -m benchmarks.solvers --limit {arguments.limit:g}`; target gap 1e-6",
        "- seconds of one solve; in brackets the relative distance of the answer to the best bound",
        "",
        "| instance | nodes | " + " | ".join(s.value for s in Solver) + " |",
        "|---" * (2 + len(Solver)) + "|",
    ]
    for label, problem in instances():
        found = {s.value: measure(problem, s, arguments.limit) for s in Solver}
        rows[label] = found
        bound = max(f["bound_s"] for f in found.values() if "bound_s" in f)
        cells = []
        for result in found.values():
            if "error" in result:
                cells.append(f"none in {result['seconds']:.1f}")
            else:
                gap = (result["objective_s"] - bound) / bound
                cells.append(f"{result['seconds']:.2f} ({max(gap, 0.0):.1e})")
        lines.append(f"| {label} | {len(problem.node_names)} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"solvers-{datetime.now():%Y%m%d}"
    (arguments.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    (arguments.out / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
