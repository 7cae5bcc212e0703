"""The commands that ask about a plan: why it is as it is, how it differs from another, what its
step would be otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autopar.arguments import (
    JsonOption,
    ModelArgument,
    PlanOption,
    Search,
    graph_for,
    with_search,
)
from autopar.plan import ParallelPlan
from autopar.report.output import show, show_json, stdout_console
from autopar.schedule import ScheduleKind

questions = typer.Typer()

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A saved plan.")]


@questions.command(
    epilog="Examples: [bold]autopar explain gpt2 --plan plan.json[/bold],"
    " [bold]autopar explain gpt2 'transformer.h.0.mlp.*' --plan plan.json[/bold]"
)
@with_search
def explain(
    model: ModelArgument,
    search: Search,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]",
            help="Of operators, modules or parameters: what their other choices would cost.",
        ),
    ] = None,
    plan_file: PlanOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show why a plan is as it is: where seconds and bytes go, what binds, what else would cost.

    Without --plan the search options choose one, for cpu:1x4 by default.
    """
    found, graph = graph_for(model, plan_file, search, quiet=as_json)
    from autopar.explain import explained_stages, matching
    from autopar.report.explain import decisions_report, explain_record, explain_report

    stages = explained_stages(graph, found)
    decisions = () if pattern is None else matching(stages, pattern)
    if as_json:
        show_json(explain_record(found, stages, decisions))
    elif pattern is None:
        show(explain_report(found, stages))
    else:
        show(decisions_report(decisions))


@questions.command(epilog="Example: [bold]autopar diff plan.json other.json[/bold]")
def diff(
    first: PlanArgument,
    second: Annotated[Path, typer.Argument(metavar="PLAN", help="Another saved plan.")],
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two plans, and what each predicts."""
    from autopar.report.diff import diff_record, diff_report, plan_difference

    difference = plan_difference(ParallelPlan.load(first), ParallelPlan.load(second))
    if as_json:
        show_json(diff_record(difference))
    else:
        show(diff_report(difference, str(first), str(second)))


@questions.command(
    epilog="Example: [bold]autopar simulate plan.json --schedule gpipe --trace trace.json[/bold]"
)
def simulate(
    plan_file: PlanArgument,
    schedule: Annotated[ScheduleKind | None, typer.Option(help="Another schedule.")] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(min=1, help="As large as the plan's: another number is another global batch."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a plan's predicted step, as planned or under another schedule or with more microbatches.

    Nothing is planned anew: the stages and their seconds and bytes per microbatch are the plan's.
    """
    if trace is not None and not trace.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {trace.parent}", param_hint="--trace")
    from autopar.report.trace import trace_record
    from autopar.report.whatif import scenario, simulation_record, simulation_report

    found = ParallelPlan.load(plan_file)
    shown = scenario(found, schedule, microbatches)
    if trace is not None:
        trace.write_text(json.dumps(trace_record(shown.timeline)), encoding="utf-8")
    if as_json:
        show_json(simulation_record(found, shown))
    else:
        show(simulation_report(found, shown, stdout_console().width - 1))
