"""A pipeline schedule drawn over time, one row per stage:

    stage 0  F0--|F1--|.....|B0------|B1------|step

Where several stages share devices, a row is a worker and letters name its stages: aF0, bF0. Cells
are as wide as they take time. `.` is idle. What is narrower than its label shows the number
of the microbatch only, or the last digits of it.
"""

from __future__ import annotations

from string import ascii_lowercase

from rich.text import Text

from autopar.actions import ActionKind
from autopar.plan import ParallelPlan
from autopar.report.units import percent_text, seconds_text
from autopar.schedule import build_schedule
from autopar.simulate import COMPUTE_STREAM, Event, StageCost, Timeline, simulate

_IDLE = "."
_COLOURS = {"F": "cyan", "B": "green", "W": "magenta"}
_OTHER_COLOUR = "yellow"


def plan_timeline(plan: ParallelPlan) -> Timeline:
    """The plan's schedule with its predicted stage times. Times of transfers are not part of a
    plan, so the step may come out a little shorter than the prediction."""
    costs = [StageCost.of(stage.prediction) for stage in plan.stages]
    schedule = build_schedule(plan.schedule, len(costs), plan.num_microbatches, plan.num_workers)
    return simulate(schedule, costs)


def schedule_picture(timeline: Timeline, width: int = 100) -> Text:
    """The grid, coloured; `.plain` is the ASCII text. width: of a whole line. O(events)."""
    shared = timeline.num_workers < len(timeline.busy_s)
    name = "worker" if shared else "stage"
    head = len(f"{name} {timeline.num_workers - 1}  ")
    columns = max(width - head, 10)
    picture = Text(no_wrap=True)
    for worker in range(timeline.num_workers):
        picture.append(f"{name} {worker}".ljust(head))
        picture.append_text(_row(timeline, worker, columns))
        picture.append("\n")
    end = seconds_text(timeline.step_s)
    picture.append(" " * head + "0" + end.rjust(columns - 1) + "\n")
    idle = f"idle ({_IDLE}) {percent_text(timeline.bubble_fraction)} of the device time"
    kinds = "F forward, B backward of a microbatch"
    if any(event.label.startswith(ActionKind.WEIGHT) for event in timeline.events):
        kinds = "F forward, B backward, W parameter gradients of a microbatch"
    picture.append(f"{kinds}; step: once per step; {idle}\n", "dim")
    if shared:
        stages = " ".join(map(str, range(0, len(timeline.busy_s), timeline.num_workers)))
        text = f"a, b, c, ..: first, second, third stage of a worker; of worker 0 {stages}\n"
        picture.append(text, "dim")
    return picture


def _row(timeline: Timeline, worker: int, columns: int) -> Text:
    row = Text()
    shared = timeline.num_workers < len(timeline.busy_s)
    scale = columns / timeline.step_s if timeline.step_s > 0 else 0.0
    position = 0
    for event in timeline.events:
        if event.stage % timeline.num_workers != worker or event.stream != COMPUTE_STREAM:
            continue
        start, end = round(event.start_s * scale), round(event.end_s * scale)
        start = max(start, position)
        if end <= start:
            continue
        chunk = event.stage // timeline.num_workers
        letter = ascii_lowercase[chunk % 26] if shared else ""
        row.append(_IDLE * (start - position), "dim")
        row.append(_cell(event.label, letter, end - start), _style(event, chunk))
        position = end
    row.append(_IDLE * (columns - position), "dim")
    return row


def _cell(label: str, chunk: str, width: int) -> str:
    """The label and a bar to the next cell, or what fits of them. chunk: stands before it."""
    if width > len(chunk + label):
        return (chunk + label).ljust(width - 1, "-") + "|"
    if width == len(chunk + label):
        return chunk + label
    number = label[1:] if label[1:].isdigit() else ""
    if number and len(chunk + number) <= width:
        return (chunk + number).ljust(width, "-")
    return (number[-width:] if number else label[:width]).ljust(width, "-")


def _style(event: Event, chunk: int) -> str:
    """Every second stage of a worker is darker."""
    shade = "bright_" if chunk % 2 == 0 else ""
    return f"black on {shade}{_COLOURS.get(event.label[:1], _OTHER_COLOUR)}"
