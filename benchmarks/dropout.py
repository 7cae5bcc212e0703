"""The same training run on one device and under six plans, dropout on: the losses must agree.

    python -m benchmarks.dropout            # GPT-2 and T5, 20 steps, virtual mesh

Dropout of 0.1 everywhere, attention included. One device runs the captured graph of the whole
batch; each plan runs on the virtual mesh, with another cut, mesh, number of microbatches or
rematerialisation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.api import plan_model
from autopar.graph.capture import capture_graph
from autopar.graph.program import Graph
from autopar.lowering.lower import lower_plan
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.runtime.simulated import VirtualRun
from autopar.verify import State, single_gradients, state_of
from benchmarks.environment import commit, machine
from cost_models import Cluster
from tests.zoo import ZOO

RESULTS = Path(__file__).parent / "results"
FAST_LINKS = Path(__file__).parent.parent / "tests" / "clusters" / "fast_links.toml"
LR = 1e-3
PLANS = {
    "4 devices, 1-D": SearchOptions(num_stages=1, mesh_shape=(4,), num_microbatches=1),
    "4 devices, 2-D": SearchOptions(num_stages=1, mesh_shape=(2, 2), num_microbatches=1),
    "2 devices x 2 stages": SearchOptions(num_stages=2, mesh_shape=(2,), num_microbatches=2),
    "4 stages": SearchOptions(num_stages=4, mesh_shape=(1,), num_microbatches=4),
    "4 devices, all recomputed": SearchOptions(
        num_stages=1, mesh_shape=(4,), num_microbatches=2, remat=Remat.FULL
    ),
    "2 stages, cheap recomputed": SearchOptions(
        num_stages=2, mesh_shape=(2,), num_microbatches=4, remat=Remat.SELECTIVE
    ),
}


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR)


def one_device(model: str, steps: int) -> list[float]:
    """Losses of the captured graph of the whole batch."""
    module, batch = ZOO[model]()
    graph, state = capture_graph(module, batch), state_of(module, batch)
    parameters = {name: nn.Parameter(p.clone()) for name, p in state.parameters.items()}
    optimizer = _optimizer(list(parameters.values()))
    losses = []
    for seed in range(steps):
        now = {name: p.detach() for name, p in parameters.items()}
        here = State(now, state.buffers, state.batch)
        loss, gradients, _ = single_gradients(graph, here, 1, seed)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        optimizer.step()
        losses.append(float(loss))
    return losses


def under_plan(graph: Graph, plan: ParallelPlan, state: State, steps: int) -> list[float]:
    run = VirtualRun(lower_plan(graph, plan), graph, state.parameters, state.buffers)
    run.attach(_optimizer)
    leaves: Sequence[Tensor] = graph.batch_spec.tensors(state.batch)
    losses = []
    for seed in range(steps):
        losses.append(float(run.step(leaves, seed).loss))
        run.update()
    return losses


def rows(model: str, steps: int) -> list[dict[str, Any]]:
    cluster = Cluster.from_toml(FAST_LINKS)
    single = one_device(model, steps)
    found = []
    for label, options in PLANS.items():
        module, batch = ZOO[model]()
        plan, graph = plan_model(module, batch, cluster, options=options)
        parallel = under_plan(graph, plan, state_of(module, batch), steps)
        errors = [abs(a - b) / abs(b) for a, b in zip(parallel, single, strict=True)]
        found.append(
            {
                "model": model,
                "plan": label,
                "microbatches": plan.num_microbatches,
                "dropout": sum("dropout" in op.op_name for op in graph.operators),
                "first": single[0],
                "last": single[-1],
                "largest_relative_difference": max(errors),
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["gpt2", "t5"], choices=list(ZOO))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for model in arguments.models for row in rows(model, arguments.steps)]
    largest = max(row["largest_relative_difference"] for row in found)
    lines = [
        f"# {arguments.steps} steps with dropout, one device and six plans",
        "",
        f"- machine: {machine()}; torch {torch.__version__}; commit {commit()}",
        f"- command: `python -m benchmarks.dropout {' '.join(sys.argv[1:])}`".rstrip(),
        f"- AdamW, lr {LR}, float32; largest relative difference of any loss: **{largest:.1e}**",
        "",
        "| model | plan | microbatches | dropout operators | first loss | last loss | largest"
        " relative difference |",
        "|---" * 7 + "|",
    ]
    for r in found:
        cells = [r["model"], r["plan"], r["microbatches"], r["dropout"]]
        cells += [f"{r['first']:.4f}", f"{r['last']:.4f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {r['largest_relative_difference']:.1e} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"dropout-{datetime.now():%Y%m%d}"
    (arguments.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    (arguments.out / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
