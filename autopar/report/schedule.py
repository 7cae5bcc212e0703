"""A pipeline schedule drawn over time, one row per stage:

    stage 0  F0--|F1--|.....|B0------|B1------|step

Cells are as wide as they take time. `.` is idle. What is narrower than its label shows the number
of the microbatch only, or the last digits of it.
"""

from __future__ import annotations

from rich.text import Text

from autopar.plan import ParallelPlan
from autopar.report.units import percent_text, seconds_text
from autopar.schedule import ActionKind, build_schedule
from autopar.simulate import COMPUTE_STREAM, Event, StageCost, Timeline, simulate

_IDLE = "."
_STYLES = {"F": "black on bright_cyan", "B": "black on bright_green"}
_OTHER_STYLE = "black on bright_yellow"


def plan_timeline(plan: ParallelPlan) -> Timeline:
    """The plan's schedule with its predicted stage times. Times of transfers are not part of a
    plan, so the step may come out a little shorter than the prediction."""
    costs = [
        StageCost(
            forward_s=s.prediction.forward_s,
            backward_s=s.prediction.backward_s,
            step_s=s.prediction.step_s,
            rest_bytes=s.prediction.standing_bytes,
            saved_bytes_per_microbatch=s.prediction.saved_bytes,
            transient_bytes=s.prediction.transient_bytes,
        )
        for s in plan.stages
    ]
    return simulate(build_schedule(plan.schedule, len(costs), plan.num_microbatches), costs)


def schedule_picture(timeline: Timeline, width: int = 100) -> Text:
    """The grid, coloured; `.plain` is the ASCII text. width: of a whole line. O(events)."""
    num_stages = len(timeline.busy_s)
    head = len(f"stage {num_stages - 1}  ")
    columns = max(width - head, 10)
    picture = Text(no_wrap=True)
    for stage in range(num_stages):
        picture.append(f"stage {stage}".ljust(head))
        picture.append_text(_row(timeline, stage, columns))
        picture.append("\n")
    end = seconds_text(timeline.step_s)
    picture.append(" " * head + "0" + end.rjust(columns - 1) + "\n")
    idle = f"idle ({_IDLE}) {percent_text(timeline.bubble_fraction)} of the device time"
    picture.append(f"F forward, B backward of a microbatch; step: once per step; {idle}\n", "dim")
    return picture


def _row(timeline: Timeline, stage: int, columns: int) -> Text:
    row = Text()
    scale = columns / timeline.step_s if timeline.step_s > 0 else 0.0
    position = 0
    for event in timeline.events:
        if event.stage != stage or event.stream != COMPUTE_STREAM:
            continue
        start, end = round(event.start_s * scale), round(event.end_s * scale)
        start = max(start, position)
        if end <= start:
            continue
        row.append(_IDLE * (start - position), "dim")
        row.append(_cell(event.label, end - start), _style(event))
        position = end
    row.append(_IDLE * (columns - position), "dim")
    return row


def _cell(label: str, width: int) -> str:
    """The label and a bar to the next cell, or what fits of them."""
    if width > len(label):
        return label.ljust(width - 1, "-") + "|"
    if width == len(label):
        return label
    number = label.lstrip("".join(ActionKind))
    return (number[-width:] if number else label[:width]).ljust(width, "-")


def _style(event: Event) -> str:
    return _STYLES.get(event.label[:1], _OTHER_STYLE)
