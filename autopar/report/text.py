"""A plan as a tree of text: what was decided, what it costs, and what lost.

`plan_tree` is for a terminal, `plan_text` the same without colour. With the graph that the plan is
for, parameters carry the model's own names and their bytes.
"""

from __future__ import annotations

import io
import re

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from autopar.graph.program import Graph
from autopar.plan import ParallelPlan, StagePlan
from autopar.report.names import heavy_strategies, layers_text, parameter_groups, remat_text
from autopar.report.units import (
    bar_text,
    bytes_text,
    mesh_text,
    percent_text,
    range_text,
    seconds_text,
)
from cost_models import Cluster

_CANDIDATE = re.compile(r"(?P<ms>[0-9.]+) ms: (?P<rest>.*)")
_MAX_ROWS = 24
_FULL = 0.95  # of the budget: worth a warning colour


def plan_tree(plan: ParallelPlan, graph: Graph | None = None) -> Tree:
    """graph: the layered graph of the plan, for names and bytes of parameters."""
    stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
    title = Text.assemble(
        ("Plan ", "bold"),
        f"of {len(plan.layer_names)} layers on ",
        (plan.cluster_text, "bold cyan"),
        f": {stages}, {plan.num_devices} device{'s' if plan.num_devices != 1 else ''}",
    )
    tree = Tree(title, guide_style="dim")
    tree.add(_step_line(plan))
    searched = _search_line(plan)
    if searched.plain:
        tree.add(searched)
    for index, stage in enumerate(plan.stages):
        _add_stage(tree, plan, index, stage, graph)
    _add_candidates(tree, plan)
    _add_warnings(tree, plan)
    return tree


def plan_text(plan: ParallelPlan, width: int = 100, graph: Graph | None = None) -> str:
    """The tree without colour, for files and tests."""
    return rendered_text(plan_tree(plan, graph), width)


def rendered_text(renderable: RenderableType, width: int = 100) -> str:
    """Any rich renderable as plain text of a fixed width, without trailing blanks."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _step_line(plan: ParallelPlan) -> Text:
    count = plan.num_microbatches
    parts = [
        f"schedule {plan.schedule}, {count} microbatch{'es' if count != 1 else ''}",
        f"bubble {percent_text(plan.bubble)}",
        f"remat {remat_text(plan.remat)}",
        *([] if plan.precision == "model" else [f"precision {plan.precision}"]),
        f"budget {bytes_text(plan.budget_bytes)} per device",
    ]
    step = (f"{seconds_text(plan.step_s)} per step, predicted", "bold green")
    return Text.assemble(step, " · " + " · ".join(parts))


def _search_line(plan: ParallelPlan) -> Text:
    """Of a saved plan without the seconds, which are not saved."""
    record = plan.search
    ranked = sorted(record.seconds.items(), key=lambda item: -item[1])
    passes = ", ".join(f"{name} {seconds_text(s)}" for name, s in ranked if s > 0)
    found = []
    if passes:
        found.append(f"searched for {seconds_text(sum(record.seconds.values()))}")
    if record.objective_s:
        proof = (
            "proved optimal"
            if record.gap < 1e-6
            else f"within {percent_text(record.gap)} of the optimum"
        )
        found.append(
            f"stage solutions {proof} (objective {seconds_text(record.objective_s)},"
            f" bound {seconds_text(record.bound_s)})"
        )
    return Text(" · ".join(found) + (f"\n{passes}" if passes else ""), "dim")


def _kind_text(plan: ParallelPlan, stage: StagePlan) -> str:
    """The kind of a stage's devices, where the cluster has several groups of nodes."""
    if len(plan.cluster["groups"]) == 1:
        return ""
    cluster = Cluster.from_dict(plan.cluster)
    names = (
        group.device.name
        for index, group in enumerate(cluster.groups)
        if stage.devices[0] in cluster.ranks(index)
    )
    return f" of {next(names)}"


def _add_stage(
    tree: Tree, plan: ParallelPlan, index: int, stage: StagePlan, graph: Graph | None
) -> None:
    names = plan.layer_names[stage.first_layer : stage.last_layer + 1]
    branch = tree.add(
        Text.assemble(
            (f"Stage {index}", "bold"),
            f": {layers_text(names)} on mesh ",
            (mesh_text(stage.axis_sizes), "bold cyan"),
            f"{_kind_text(plan, stage)}"
            f" (device{'s' if len(stage.devices) > 1 else ''} {range_text(stage.devices)})",
        )
    )
    p = stage.prediction
    branch.add(
        f"forward {seconds_text(p.forward_s)}, backward {seconds_text(p.backward_s)} per"
        f" microbatch; {seconds_text(p.step_s)} once per step"
    )
    branch.add(_memory_lines(plan, stage))
    if stage.parameters:
        branch.add(_parameter_table(stage, graph))
    if heavy_strategies(stage):
        branch.add(_operator_table(stage))


def _memory_lines(plan: ParallelPlan, stage: StagePlan) -> Text:
    p = stage.prediction
    share = p.peak_bytes / plan.budget_bytes if plan.budget_bytes else 0.0
    kinds = {
        "parameters": p.parameter_bytes,
        "gradients": p.gradient_bytes,
        "optimizer": p.optimizer_bytes,
        f"saved {p.in_flight} x": p.saved_bytes,
        "transient": p.transient_bytes,
    }
    if p.host_bytes:
        kinds["and on the host"] = p.host_bytes
    bar = f"{bar_text(share)} {percent_text(share)} of the budget" if plan.budget_bytes else ""
    detail = " · ".join(f"{kind} {bytes_text(nbytes)}" for kind, nbytes in kinds.items())
    return Text.assemble(
        f"peak {bytes_text(p.peak_bytes)} per device ",
        (bar, "bold red" if share > _FULL else "green"),
        (f"\n{detail}", "dim"),
    )


def _parameter_table(stage: StagePlan, graph: Graph | None) -> Table:
    """rest: the layout between steps. step: the layout held through a step."""
    table = _table("parameters", "at rest", "in the step", "count")
    if graph is not None:
        table.add_column("bytes", justify="right")
    groups = parameter_groups(stage, graph)
    for group in groups[:_MAX_ROWS]:
        rest, step = group.placement.rest, group.placement.step
        row = [group.pattern, f"{rest} host" if group.placement.host else rest]
        row.append("same" if step == rest else step)
        row.append(str(group.count))
        if graph is not None:
            row.append("?" if group.nbytes is None else bytes_text(group.nbytes))
        table.add_row(*row)
    if len(groups) > _MAX_ROWS:
        table.add_row(f"... and {len(groups) - _MAX_ROWS} more patterns")
    return table


def _operator_table(stage: StagePlan) -> Table:
    """How many heavy operators give which factor to which mesh axis."""
    table = _table("heavy operators", "factor per mesh axis (how many)")
    for family, counts in heavy_strategies(stage).items():
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        table.add_row(family, ", ".join(f"{_factors(text)} ({n})" for text, n in ranked))
    return table


def _factors(text: str) -> str:
    return "replicated" if set(text.split()) <= {"-"} else text


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim italic")
    for column in columns:
        table.add_column(column, justify="right" if column == "count" else "left")
    return table


def _add_candidates(tree: Tree, plan: ParallelPlan) -> None:
    """The first one is the plan; the others say by how much they lose."""
    rows = [_CANDIDATE.fullmatch(text) for text in plan.search.candidates]
    if len(rows) < 2 or rows[0] is None:
        return
    branch = tree.add("Candidates that lost")
    best_ms = float(rows[0]["ms"])
    for match in rows[1:]:
        if match is not None and best_ms > 0:
            slower = float(match["ms"]) / best_ms - 1
            time = seconds_text(float(match["ms"]) / 1e3)
            branch.add(Text(f"+{percent_text(slower)} ({time}): {match['rest']}", "dim"))


def _add_warnings(tree: Tree, plan: ParallelPlan) -> None:
    for note in plan.search.notes:
        tree.add(Text(f"Note: {note}", "yellow"))
    for sentence in plan.unwritten_rules():
        tree.add(Text(f"Warning: {sentence}", "bold yellow"))
