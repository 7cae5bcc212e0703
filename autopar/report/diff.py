"""What differs between two plans: settings, stages, predictions side by side, placements and
strategies in groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.plan import ParallelPlan, ParameterPlacement, StagePlan
from autopar.report.names import (
    is_derived,
    layers_text,
    operator_family,
    parameter_pattern,
    remat_text,
)
from autopar.report.units import (
    bytes_text,
    mesh_text,
    number_text,
    percent_text,
    range_text,
    seconds_text,
)

_ROWS = 24  # of a table
_NONE = "-"  # where one plan has nothing


@dataclass(frozen=True, slots=True)
class Change:
    """What one plan has and the other; count: how many operators or parameters."""

    name: str
    first: str
    second: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """A prediction of both plans. unit: "s", "B" or "" (a share)."""

    name: str
    first: float
    second: float
    unit: str

    @property
    def ratio(self) -> float | None:
        """second / first."""
        return self.second / self.first if self.first else None


@dataclass(frozen=True, slots=True)
class Difference:
    """same_graph: both plans are of one captured graph. figures are all there; the others are what
    differs."""

    same_graph: bool
    settings: tuple[Change, ...]
    stages: tuple[Change, ...]
    placements: tuple[Change, ...]
    strategies: tuple[Change, ...]
    figures: tuple[Figure, ...]

    @property
    def decisions_equal(self) -> bool:
        return not (self.settings or self.stages or self.placements or self.strategies)


def plan_difference(first: ParallelPlan, second: ParallelPlan) -> Difference:
    """O(operators)."""
    return Difference(
        same_graph=first.graph == second.graph,
        settings=_changed(_settings(first), _settings(second)),
        stages=_changed(_stages(first), _stages(second)),
        placements=_grouped(_placements(first), _placements(second), parameter_pattern),
        strategies=_grouped(_strategies(first), _strategies(second), operator_family),
        figures=tuple(_figures(first, second)),
    )


def _settings(plan: ParallelPlan) -> dict[str, str]:
    return {
        "cluster": plan.cluster_text,
        "layers": str(len(plan.layer_names)),
        "stages": str(len(plan.stages)),
        "schedule": str(plan.schedule),
        "microbatches": str(plan.num_microbatches),
        "remat": remat_text(plan.remat),
        "precision": plan.precision,
        "budget": bytes_text(plan.budget_bytes),
    }


def _stages(plan: ParallelPlan) -> dict[str, str]:
    def text(stage: StagePlan) -> str:
        names = plan.layer_names[stage.first_layer : stage.last_layer + 1]
        mesh = mesh_text(stage.axis_sizes)
        return f"{layers_text(names)} on {mesh} (devices {range_text(stage.devices)})"

    return {f"stage {index}": text(stage) for index, stage in enumerate(plan.stages)}


def _placements(plan: ParallelPlan) -> dict[str, str]:
    def text(p: ParameterPlacement) -> str:
        rest = f"{p.rest} host" if p.host else p.rest
        return rest if p.rest == p.step else f"{rest}, {p.step} in the step"

    return {n: text(p) for stage in plan.stages for n, p in stage.parameters.items()}


def _strategies(plan: ParallelPlan) -> dict[str, str]:
    """Hubs and recomputed copies follow from the others, and are left out."""
    return {
        name: text
        for stage in plan.stages
        for name, text in stage.strategies.items()
        if not is_derived(name)
    }


def _changed(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Change, ...]:
    names = dict.fromkeys((*first, *second))
    pairs = ((name, first.get(name, _NONE), second.get(name, _NONE)) for name in names)
    return tuple(Change(name, a, b) for name, a, b in pairs if a != b)


def _grouped(
    first: Mapping[str, str], second: Mapping[str, str], group: Callable[[str], str]
) -> tuple[Change, ...]:
    """Changes of one group, from one text to one other, are one; the most frequent first."""
    counts = Counter((group(c.name), c.first, c.second) for c in _changed(first, second))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Change(name, a, b, count) for (name, a, b), count in ranked)


def _figures(first: ParallelPlan, second: ParallelPlan) -> Iterator[Figure]:
    yield Figure("step", first.step_s, second.step_s, "s")
    yield Figure("bubble", first.bubble, second.bubble, "")
    predictions = [[s.prediction for s in plan.stages] for plan in (first, second)]
    for label, attribute, unit in (
        ("largest forward", "forward_s", "s"),
        ("largest backward", "backward_s", "s"),
        ("largest once per step", "step_s", "s"),
        ("largest peak", "peak_bytes", "B"),
    ):
        a, b = (max(getattr(p, attribute) for p in stages) for stages in predictions)
        yield Figure(label, a, b, unit)
    if len(first.stages) != len(second.stages):
        return
    for index, (p, q) in enumerate(zip(*predictions, strict=True)):
        yield Figure(f"stage {index} forward", p.forward_s, q.forward_s, "s")
        yield Figure(f"stage {index} backward", p.backward_s, q.backward_s, "s")
        yield Figure(f"stage {index} once per step", p.step_s, q.step_s, "s")
        yield Figure(f"stage {index} peak", p.peak_bytes, q.peak_bytes, "B")


def diff_report(difference: Difference, first: str, second: str) -> RenderableType:
    """first, second: what the plans are called."""
    parts: list[RenderableType] = []
    if not difference.same_graph:
        text = "The plans are of different graphs (another model, batch, microbatch or version)."
        parts.append(Text(text, "yellow"))
    if difference.decisions_equal:
        parts.append(Text("Both plans decide the same."))
    titles = {
        "settings": difference.settings,
        "stages": difference.stages,
        "parameters, at rest": difference.placements,
        "operators, factor per mesh axis": difference.strategies,
    }
    for title, changes in titles.items():
        if changes:
            parts.append(_change_table(title, changes, first, second))
    parts.append(_figure_table(difference.figures, first, second))
    return Group(*parts)


def _change_table(title: str, changes: Sequence[Change], first: str, second: str) -> Table:
    table = _table(title, first, second)
    counted = any(change.count > 1 for change in changes)
    if counted:
        table.add_column("count", justify="right")
    for change in changes[:_ROWS]:
        count = [str(change.count)] if counted else []
        table.add_row(change.name, change.first, change.second, *count)
    if len(changes) > _ROWS:
        table.add_row(f"... and {len(changes) - _ROWS} more")
    return table


def _figure_table(figures: Sequence[Figure], first: str, second: str) -> Table:
    table = _table("predicted", first, second, right=2)
    table.add_column("ratio", justify="right")
    texts = {"s": seconds_text, "B": bytes_text, "": percent_text}
    for figure in figures:
        text = texts[figure.unit]
        ratio = "" if figure.ratio is None else number_text(figure.ratio)
        table.add_row(figure.name, text(figure.first), text(figure.second), ratio)
    return table


def _table(*columns: str, right: int = 0) -> Table:
    """right: how many of the last columns are numbers."""
    table = Table(header_style="bold", title_justify="left")
    for index, column in enumerate(columns):
        numbers = index >= len(columns) - right
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    return table


def diff_record(difference: Difference) -> dict[str, Any]:
    """For --json; seconds and bytes."""

    def changes(found: Sequence[Change]) -> list[dict[str, Any]]:
        return [
            {"name": c.name, "first": c.first, "second": c.second, "count": c.count} for c in found
        ]

    return {
        "same_graph": difference.same_graph,
        "settings": changes(difference.settings),
        "stages": changes(difference.stages),
        "placements": changes(difference.placements),
        "strategies": changes(difference.strategies),
        "predictions": [
            {"name": f.name, "first": f.first, "second": f.second, "ratio": f.ratio}
            for f in difference.figures
        ],
    }
