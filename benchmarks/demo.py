"""`make demo`: GPT-2 124M trains on four local CPU processes and on one, and the losses agree.

Hugging Face's GPT2LMHeadModel at GPT-2's real configuration, dropout on, random weights under a
seed; the text is Python's own language reference, byte by byte. The plan is pinned to two pipeline
stages of two devices each. The single process runs the same model by the same API on one device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autopar.api import parallelize, plan_model
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from autopar.report.console import SearchLine, training_bar
from autopar.report.text import plan_tree
from autopar.report.units import seconds_text
from autopar.runtime.launch import run_processes
from benchmarks.text import byte_batches
from cost_models import Cluster

BATCH, SEQ, STEPS, MICROBATCHES = 4, 64, 10, 2
LEARNING_RATE = 3e-4
SEED = 0
TOLERANCE = 1e-4  # of the loss, relative, after any step
WIDTH = 110  # columns where stdout is no terminal

Batch = Mapping[str, Tensor]


def gpt2() -> nn.Module:
    """GPT2LMHeadModel at 124M. No key-value cache: it is of no use in training."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return model.train()


def batches() -> list[Batch]:
    tokens = byte_batches(BATCH, SEQ, STEPS, seed=SEED)
    return [{"input_ids": rows, "labels": rows.clone()} for rows in tokens]


def train(world: Any, plan: ParallelPlan, title: str) -> list[float]:
    """One process of the job, which has joined `world`; None is a job of one. The losses."""
    torch.set_num_threads(1)  # more would only spin: the machine may be busy
    model = gpt2()
    parallel = parallelize(model, batches()[0], plan=plan)
    del model
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=LEARNING_RATE)
    losses = []
    with training_bar(STEPS, title, shown=world is None or world.rank == 0) as bar:
        for batch in batches():
            loss = float(parallel.train_step(batch))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            bar.advance(loss)
    return losses


def plans(console: Console) -> tuple[ParallelPlan, ParallelPlan]:
    """For four devices and for one; the former is shown."""
    with torch.device("meta"):
        model = gpt2()
    example = batches()[0]
    with SearchLine("planning") as line:
        plan, graph = plan_model(
            model,
            example,
            Cluster.parse("cpu:1x4"),
            options=SearchOptions(num_stages=2, mesh_shape=(2,), num_microbatches=MICROBATCHES),
            progress=line,
        )
        single, _ = plan_model(
            model,
            example,
            Cluster.parse("cpu:1x1"),
            options=SearchOptions(num_microbatches=MICROBATCHES),
            progress=line,
        )
    console.print(plan_tree(plan, graph))
    return plan, single


def largest_difference(ours: list[float], single: list[float]) -> float:
    """Relative. Infinite where a loss is no number."""
    errors = [abs(a - b) / abs(b) for a, b in zip(ours, single, strict=True)]
    return max((e if e == e else float("inf")) for e in errors)


def comparison(ours: list[float], single: list[float]) -> Table:
    table = Table(title="Loss by step", title_justify="left")
    for column in ("step", "4 processes", "1 process", "relative difference"):
        table.add_column(column, justify="right")
    for step, (a, b) in enumerate(zip(ours, single, strict=True)):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b) / abs(b):.1e}")
    return table


def main() -> int:
    torch.set_num_threads(1)
    started = time.monotonic()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(
        f"GPT-2 124M (Hugging Face), batch {BATCH} x {SEQ} bytes of Python's language reference,"
        f" {STEPS} steps of AdamW\n"
    )
    plan, single_plan = plans(console)
    console.print()
    ours: list[float] = run_processes(train, 4, plan, "4 processes")[0]
    single: list[float] = run_processes(train, 1, single_plan, "1 process  ")[0]
    console.print(comparison(ours, single))
    error = largest_difference(ours, single)
    agree = error <= TOLERANCE
    verdict = "[bold green]agree[/]" if agree else "[bold red]DISAGREE[/]"
    console.print(
        f"The losses {verdict}: largest relative difference {error:.1e}, limit {TOLERANCE:.0e}."
        f" {seconds_text(time.monotonic() - started)} in all."
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
