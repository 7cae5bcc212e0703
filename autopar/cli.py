"""The command line. Reads arguments and prints; what it does is `api`, `verify` and `report`.

Exit codes: 0 done, 1 disagreement or failed run, 2 bad input, 130 interrupted. With --json stdout
has one JSON value and nothing else; progress and errors are on stderr.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from autopar.arguments import (
    CLUSTER_HELP,
    JsonOption,
    ModelArgument,
    PlanOption,
    Search,
    cluster_of,
    on_meta_first,
    plan_for,
    search_options,
    search_plan,
    with_search,
)
from autopar.errors import AutoparError, RuntimeFailure
from autopar.garbage import seldom_collected
from autopar.plan import ParallelPlan
from autopar.questions import questions
from autopar.report.output import show as _print
from autopar.report.output import show_json as _print_json
from autopar.report.output import stdout_console

app = typer.Typer(
    name="autopar",
    help="Find the best way to run a PyTorch training step on a cluster, prove it, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
bench = typer.Typer(no_args_is_help=True, help="Measure planning time and training speed.")


class DtypeName(StrEnum):
    float32 = "float32"
    float64 = "float64"


class BackendName(StrEnum):
    gloo = "gloo"
    nccl = "nccl"


SeedOption = Annotated[int, typer.Option(help="Of the random operators, such as dropout.")]


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False,
) -> None:
    if verbose:
        from rich.logging import RichHandler

        from autopar.report.console import stderr_console

        handler = RichHandler(console=stderr_console(), show_path=False)
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", handlers=[handler])


@app.command(
    epilog="Example: [bold]autopar plan gpt2 --cluster h100:1x8 --memory 70GiB -o plan.json[/bold]"
)
@with_search
def plan(
    model: ModelArgument,
    search: Search,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the plan.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search for the best plan. Needs neither the cluster nor the model's weights.

    Best is the least predicted time of a step of the whole batch: the most throughput. Ctrl-C ends
    the search with the best plan so far.
    """
    if output is not None and not output.parent.is_dir():  # before minutes of search
        raise typer.BadParameter(f"there is no directory {output.parent}", param_hint="--output")
    found, graph = search_plan(model, search, default_cluster=None, quiet=as_json)
    if output is not None:
        found.save(output)
    if as_json:
        _print_json(found.to_json())
        return
    from autopar.report.text import plan_tree

    _print(plan_tree(found, graph))
    if output is not None:
        _print(f"Saved to {output}. Next: autopar verify {model} --plan {output}")


@app.command(epilog="Example: [bold]autopar show plan.json --schedule[/bold]")
def show(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A saved plan.")],
    schedule: Annotated[bool, typer.Option("--schedule", help="Draw the schedule.")] = False,
    operators: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="List the strategy of each operator that matches."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a saved plan: stages, layouts, predictions."""
    found = ParallelPlan.load(plan_file)
    if as_json:
        _print_json(found.to_json())
    elif operators is not None:
        from autopar.report.operators import operator_table

        _print(operator_table(found, _pattern(operators)))
    elif schedule:
        from autopar.report.schedule import plan_timeline, schedule_picture

        _print(schedule_picture(plan_timeline(found), stdout_console().width - 1))
    else:
        from autopar.report.text import plan_tree

        _print(plan_tree(found))


app.add_typer(questions)


@app.command(
    epilog="Examples: [bold]autopar coverage mixtral[/bold],"
    " [bold]autopar coverage llama-3-8b --cluster h100:1x8[/bold]"
)
def coverage(
    model: ModelArgument,
    cluster: Annotated[
        str | None, typer.Option(metavar="CLUSTER", help=f"Count its devices. {CLUSTER_HELP}")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what of a model can be sharded, and what is replicated and why.

    Without --cluster by any number of devices.
    """
    found = cluster_of(cluster)
    from autopar.graph.capture import capture_graph
    from autopar.report.console import SearchLine
    from autopar.report.coverage import coverage_of, coverage_record, coverage_report

    with SearchLine(f"capturing {model}", quiet=as_json):
        graph = on_meta_first(model, lambda m: capture_graph(m.module, m.example_batch))
    report = coverage_of(model, graph, found)
    if as_json:
        _print_json(coverage_record(report))
    else:
        _print(coverage_report(report))


@app.command(
    epilog="Example: [bold]autopar verify t5 --cluster cpu:1x4 --stages 2 --dtype float64[/bold]"
)
@with_search
def verify(
    model: ModelArgument,
    search: Search,
    plan_file: PlanOption = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Real processes, not the virtual mesh.")
    ] = False,
    dtype: Annotated[DtypeName, typer.Option(help="Of the comparison.")] = DtypeName.float32,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Play one training step of a plan and compare it with one device: loss, gradients, parameters.

    Without --plan the search options choose one, for cpu:1x4 by default. Exit code 1 where it
    disagrees.
    """
    found, loaded = plan_for(model, plan_file, search, quiet=as_json)
    from autopar.models import load_pair
    from autopar.report.console import SearchLine
    from autopar.report.verify import verify_record, verify_table
    from autopar.verify import verify_plan

    with SearchLine("verifying", quiet=as_json):
        report = verify_plan(
            loaded.module,
            loaded.example_batch,
            found,
            dtype=dtype.value,
            seed=seed,
            processes=functools.partial(load_pair, model) if processes else None,
        )
    if as_json:
        _print_json({"model": loaded.name, **verify_record(report)})
    else:
        _print(verify_table(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [bold]autopar run gpt2 --cluster cpu:1x4 --steps 20[/bold], or"
    " [bold]torchrun --nproc-per-node 8 -m autopar.cli run MODEL --plan plan.json[/bold]"
)
@with_search
def run(
    model: ModelArgument,
    search: Search,
    plan_file: PlanOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train on the example batch: on local processes, or as one process of torchrun."""
    rank = os.environ.get("RANK")
    if rank is None:
        found, loaded = plan_for(model, plan_file, search, quiet=as_json)
        del loaded  # each process makes its own
        losses = _train_locally(Training(model, found, steps, lr, seed, shown=not as_json))
    else:
        given = None if plan_file is None else ParallelPlan.load(plan_file)
        job = Training(model, given, steps, lr, seed, shown=rank == "0" and not as_json)
        losses = train(None, job, search)
        if rank != "0":
            return
    if as_json:
        _print_json({"model": model, "losses": losses})
    else:
        _print(f"{steps} steps: loss {losses[0]:.6f} -> {losses[-1]:.6f}")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models that have a name."""
    from autopar.models import model_sources

    found = model_sources()
    if as_json:
        _print_json(found)
        return
    from rich.table import Table

    table = Table("MODEL", "what", box=None)
    for name, text in found.items():
        table.add_row(name, text)
    _print(table)


app.add_typer(bench, name="bench")


@bench.command("plan", epilog="Example: [bold]autopar bench plan --cases gpt2-124m[/bold]")
def bench_plan(
    cases: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    results: Annotated[Path | None, typer.Option(help="Result file to continue.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Seconds and memory of planning, by pass, each run in a fresh process."""
    from benchmarks.run import run_suite

    outcome = run_suite("plan", cases=cases, settings={"repeats": repeats}, path=results)
    _show_bench(outcome, as_json)


@bench.command(
    "speed", epilog="Example: [bold]autopar bench speed --cases gpt-tiny --devices 2[/bold]"
)
def bench_speed(
    cases: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    devices: Annotated[int, typer.Option(min=1, help="Processes, one device each.")] = 2,
    backend: Annotated[BackendName, typer.Option(help="Of the collectives.")] = BackendName.gloo,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before.")] = 5,
    runners: Annotated[str, typer.Option(help="Names, as zero-*, separated by ;, or all.")] = "",
    pairs: Annotated[bool, typer.Option(help="Cases side by side, on GPUs of their own.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Of all.", show_default="no limit")] = None,
    traces: Annotated[Path | None, typer.Option(help="Folder for GPU profiles.")] = None,
    results: Annotated[Path | None, typer.Option(help="Result file to continue.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ours, and other plans of ours, against the usual recipes for the same model."""
    from benchmarks import environment, speed
    from benchmarks.run import run_suite, side_by_side

    settings = speed.settings(
        devices=devices, backend=backend.value, steps=steps, warmup=warmup, runners=runners
    )
    gpus = environment.num_gpus() if pairs else 0
    places = side_by_side(gpus, devices, minutes=minutes, traces=traces)
    outcome = run_suite("speed", cases=cases, settings=settings, path=results, places=places)
    _show_bench(outcome, as_json)


@dataclass(frozen=True, slots=True)
class Training:
    """What every process of `run` needs; it travels to spawned ones."""

    model: str
    plan: ParallelPlan | None
    steps: int
    lr: float
    seed: int
    shown: bool


def train(world: Any, job: Training, search: Search = Search()) -> list[float]:
    """One process of `run`: the loss of each step. world: of a spawned process, which has joined
    it; parallelize finds it, or torchrun's."""
    import torch

    from autopar.api import parallelize
    from autopar.graph.precision import Precision
    from autopar.models import load_model
    from autopar.report.console import training_bar

    loaded = load_model(job.model)
    parallel = parallelize(
        loaded.module,
        loaded.example_batch,
        plan=job.plan,
        cluster=cluster_of(search.cluster),
        memory_budget=search.memory,
        precision=Precision.parse(search.precision or "model"),
        options=search_options(search),
    )
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=job.lr)
    losses = []
    shown = job.shown and (world is None or world.rank == 0)
    with training_bar(job.steps, f"training {loaded.name}", shown=shown) as bar:
        for step in range(job.steps):
            loss = float(parallel.train_step(loaded.example_batch, seed=job.seed + step))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            bar.advance(loss)
    return losses


def _train_locally(job: Training) -> list[float]:
    """On as many local processes as the plan has devices."""
    assert job.plan is not None
    if job.plan.num_devices == 1:
        return train(None, job)
    from autopar.runtime.launch import run_processes

    losses: list[float] = run_processes(train, job.plan.num_devices, job)[0]
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point: an exit code, never a traceback for what a user can put right."""
    from cost_models.errors import CostModelError

    given = list(sys.argv[1:] if arguments is None else arguments)
    if not {"--verbose", "-v"} & set(given):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # here and in spawned processes
    try:
        with seldom_collected(last=arguments is None):
            app(given, prog_name="autopar")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (AutoparError, CostModelError) as error:
        from autopar.report.console import show_error

        if "--json" in given:
            _print_json({"error": type(error).__name__, "message": str(error)})
        show_error(type(error).__name__, str(error))
        return 1 if isinstance(error, RuntimeFailure) else 2
    return 0


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}") from error


def _show_bench(outcome: Any, as_json: bool) -> None:
    if as_json:
        _print_json(outcome.record)
    else:
        _print(outcome.markdown)
        _print(f"Results: {outcome.path}")
    if outcome.num_failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(main())
