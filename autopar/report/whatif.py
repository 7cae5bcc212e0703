"""A plan's step played under other schedules and numbers of microbatches.

    kept      a stage's seconds per microbatch and once per step, its bytes: they are the plan's, at
              its microbatch size
    changes   how many microbatches there are, and with them the rows of a step; how many are in
              flight, and what is saved for them; the order of the actions

So another number of microbatches is another global batch. The same batch in other microbatches is
another plan, as every operator has another size. Transfers between stages are not part of a plan
and take no time here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.errors import PlanError, ScheduleError
from autopar.plan import ParallelPlan
from autopar.report.schedule import plan_timeline, schedule_picture
from autopar.report.units import bytes_text, percent_text, seconds_text
from autopar.schedule import ScheduleKind
from autopar.simulate import Timeline

_MORE = (1, 2, 4)  # times the microbatches of the plan


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """A plan with another schedule or number of microbatches, and its step."""

    plan: ParallelPlan
    timeline: Timeline

    @property
    def peak_bytes(self) -> float:
        """Of the device that needs most."""
        return max(self.timeline.worker_peak_bytes)

    @property
    def microbatch_s(self) -> float:
        """Seconds of a step per microbatch: the inverse of the throughput."""
        return self.timeline.step_s / self.plan.num_microbatches

    @property
    def label(self) -> str:
        return f"{self.plan.schedule}, {self.plan.num_microbatches}"


def scenario(
    plan: ParallelPlan, schedule: ScheduleKind | None = None, num_microbatches: int | None = None
) -> Scenario:
    """None: as the plan has it. ScheduleError or PlanError where these stages cannot play it."""
    changed = replace(
        plan,
        schedule=schedule or plan.schedule,
        num_microbatches=num_microbatches or plan.num_microbatches,
    )
    return Scenario(changed, plan_timeline(changed))


def scenarios(plan: ParallelPlan) -> Iterator[Scenario]:
    """Every schedule that the stages can play, at a few numbers of microbatches."""
    for schedule in ScheduleKind if len(plan.stages) > 1 else (plan.schedule,):
        for times in _MORE:
            try:
                yield scenario(plan, schedule, times * plan.num_microbatches)
            except (ScheduleError, PlanError):  # a family that wants other numbers
                continue


def simulation_report(plan: ParallelPlan, shown: Scenario, width: int) -> RenderableType:
    """The picture of one scenario, what its stages need, and a table of others."""
    return Group(
        schedule_picture(shown.timeline, width),
        _step_line(plan, shown),
        _stage_table(shown),
        _scenario_table(plan, shown, list(scenarios(plan))),
        *(Text(f"{sentence}.", "dim") for sentence in assumptions(plan, shown)),
    )


def assumptions(plan: ParallelPlan, shown: Scenario) -> tuple[str, ...]:
    """Sentences: what was kept and what not."""
    before, after = plan.num_microbatches, shown.plan.num_microbatches
    found = ["Transfers between stages take no time here"] if len(plan.stages) > 1 else []
    found.append(
        "Seconds and bytes of a microbatch are the plan's: with more microbatches a step has more"
        " rows, each microbatch as many as before"
    )
    if after != before:
        found.append(f"Here a step has {after / before:g} times the rows of the plan's batch")
    if before == 1:
        found.append(
            "The plan has one microbatch, whose gradients are not accumulated: with several, a"
            " device also holds the gradients of one beside the sums"
        )
    return tuple(found)


def _step_line(plan: ParallelPlan, shown: Scenario) -> Text:
    return Text.assemble(
        (f"{seconds_text(shown.timeline.step_s)} per step", "bold green"),
        f" ({seconds_text(shown.microbatch_s)} per microbatch), bubble"
        f" {percent_text(shown.timeline.bubble_fraction)}; the plan predicts"
        f" {seconds_text(plan.step_s)}, transfers included",
    )


def _stage_table(shown: Scenario) -> Table:
    table = _table("stage", "busy", "of the step", "peak per device", "of the budget")
    for index, (busy, peak) in enumerate(
        zip(shown.timeline.busy_s, shown.timeline.peak_bytes, strict=True)
    ):
        table.add_row(
            str(index),
            seconds_text(busy),
            percent_text(busy / shown.timeline.step_s if shown.timeline.step_s else 0.0),
            *_peak(shown.plan, peak),
        )
    return table


def _scenario_table(plan: ParallelPlan, shown: Scenario, others: Sequence[Scenario]) -> Table:
    table = _table(
        "schedule", "microbatches", "step", "per microbatch", "bubble", "peak", "of the budget"
    )
    for other in others:
        own = other.label == shown.label
        style = "bold" if own else ""
        table.add_row(
            str(other.plan.schedule),
            str(other.plan.num_microbatches),
            seconds_text(other.timeline.step_s),
            seconds_text(other.microbatch_s),
            percent_text(other.timeline.bubble_fraction),
            *_peak(plan, other.peak_bytes),
            style=style,
        )
    return table


def _peak(plan: ParallelPlan, peak: float) -> tuple[str, Text]:
    share = peak / plan.budget_bytes if plan.budget_bytes else 0.0
    return bytes_text(peak), Text(percent_text(share), "bold red" if share > 1 else "")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim italic")
    for column in columns:
        table.add_column(column, justify="left" if column in ("stage", "schedule") else "right")
    return table


def simulation_record(plan: ParallelPlan, shown: Scenario) -> dict[str, Any]:
    """For --json; seconds and bytes."""
    return {
        **_scenario_record(shown),
        "planned_step_s": plan.step_s,
        "busy_s": list(shown.timeline.busy_s),
        "peak_bytes": list(shown.timeline.peak_bytes),
        "budget_bytes": plan.budget_bytes,
        "assumptions": list(assumptions(plan, shown)),
        "scenarios": [_scenario_record(other) for other in scenarios(plan)],
    }


def _scenario_record(shown: Scenario) -> dict[str, Any]:
    return {
        "schedule": shown.plan.schedule.value,
        "num_microbatches": shown.plan.num_microbatches,
        "step_s": shown.timeline.step_s,
        "bubble": shown.timeline.bubble_fraction,
        "largest_peak_bytes": shown.peak_bytes,
    }
