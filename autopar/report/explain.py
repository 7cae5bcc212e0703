"""Why a plan is as it is, as tables: what binds, per stage where seconds and bytes go, and for some
operators and parameters what the other choices would cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.explain import (
    ONCE_PER_STEP,
    Alternative,
    Decision,
    ExplainedStage,
    Kind,
    OperatorCost,
    Tensor,
    at_peak,
    best_change,
    ledger,
    operator_costs,
    tensors,
)
from autopar.graph.hubs import SAVE_SUFFIX
from autopar.graph.program import Phase
from autopar.plan import ParallelPlan
from autopar.report.names import operator_family, parameter_pattern
from autopar.report.schedule import plan_timeline
from autopar.report.units import bytes_text, mesh_text, percent_text, seconds_text

_LEAST_S = 1e-12  # less is rounding
_ROWS = 10  # of a list
_LARGEST = 3  # kinds of tensors
_ALTERNATIVES = 12  # of a decision
_DECISIONS = 8  # different ones that are shown in full
_BINDS = 0.95  # share of the budget from which on memory is said to bind
_STALE = 0.01  # relative difference from the plan's prediction that is worth a word
_UNEVEN = 0.02  # a stage this much above the others sets the pace


def explain_report(plan: ParallelPlan, stages: Sequence[ExplainedStage]) -> RenderableType:
    """The whole plan."""
    parts: list[RenderableType] = [Text("What binds", "bold")]
    parts += [Text(f"  {sentence}") for sentence in binding(plan, stages)]
    for stage in stages:
        mesh = mesh_text(stage.plan.axis_sizes)
        parts += [
            Text(),
            Text(f"Stage {stage.index} on mesh {mesh}", "bold"),
            _ledger_table(stage),
            _bytes_table(stage),
            _operator_table(stage),
        ]
    return Group(*parts)


def binding(plan: ParallelPlan, stages: Sequence[ExplainedStage]) -> tuple[str, ...]:
    """Sentences: the stage that sets the pace, the bubble, memory, and what was worth its bytes."""
    found = []
    times = [s.plan.prediction.forward_s + s.plan.prediction.backward_s for s in stages]
    if len(stages) > 1:
        slowest = max(range(len(times)), key=times.__getitem__)
        above = times[slowest] / statistics.mean(times) - 1
        pace = (
            f"stage {slowest} sets the pace: {seconds_text(times[slowest])} per microbatch,"
            f" {percent_text(above)} above the mean of the stages"
            if above > _UNEVEN
            else f"the stages are even: the slowest is {percent_text(above)} above their mean"
        )
        found.append(
            f"{pace}; devices are idle {percent_text(plan.bubble)} of the step"
            f" ({plan.schedule}, {plan.num_microbatches} microbatches, {len(stages)} stages)"
        )
    found += _memory_sentences(plan)
    for stage in stages:
        change = best_change(stage)
        if change is not None:
            found.append(_change_sentence(plan, stage, *change))
        found += _stale_sentence(stage)
    return tuple(found)


def _memory_sentences(plan: ParallelPlan) -> list[str]:
    """Of the devices of each stage, or of several that share them."""
    shares = [peak / plan.budget_bytes for peak in plan_timeline(plan).worker_peak_bytes]
    full = [
        f"memory binds on the devices of stage {index}: {percent_text(share)} of the budget"
        for index, share in enumerate(shares)
        if share >= _BINDS
    ]
    return full or [f"memory is not full: at most {percent_text(max(shares))} of the budget"]


def _change_sentence(
    plan: ParallelPlan, stage: ExplainedStage, decision: Decision, change: Alternative
) -> str:
    room = plan.budget_bytes - stage.plan.prediction.peak_bytes
    fits = "a pin, or the gap of the search" if change.nbytes <= room else "there is no room"
    return (
        f"stage {stage.index} would be {seconds_text(-change.seconds)} per step faster with"
        f" {decision.kind} {decision.name} {_chosen_text(change.text)} for"
        f" {_chosen_text(decision.chosen)}, bytes {_signed_bytes(change.nbytes)}: {fits}"
    )


def _stale_sentence(stage: ExplainedStage) -> list[str]:
    """The ledger is of this version's cost model, the prediction of that which made the plan."""
    p, spent = stage.plan.prediction, ledger(stage)
    planned = stage.num_microbatches * (p.forward_s + p.backward_s) + p.step_s
    now = sum(_per_step(stage, kind, spent[kind]) for kind in Kind if kind is not Kind.TRANSFER)
    if abs(now - planned) <= _STALE * planned:
        return []
    return [
        f"the plan predicted {seconds_text(planned)} per step of stage {stage.index}, this cost"
        f" model {seconds_text(now)}: another version or another optimizer made the plan"
    ]


def _per_step(stage: ExplainedStage, kind: Kind, seconds: float) -> float:
    return seconds if kind in ONCE_PER_STEP else seconds * stage.num_microbatches


def _ledger_table(stage: ExplainedStage) -> Table:
    table = _table("seconds", "per microbatch", "per step", "share")
    spent = ledger(stage)
    total = sum(_per_step(stage, kind, value) for kind, value in spent.items())
    for kind, value in spent.items():
        if value:
            step = _per_step(stage, kind, value)
            once = kind in ONCE_PER_STEP
            share = percent_text(step / total)
            table.add_row(
                kind.value, "" if once else seconds_text(value), seconds_text(step), share
            )
    table.add_row("all", "", seconds_text(total), "", style="bold")
    return table


def _bytes_table(stage: ExplainedStage) -> Table:
    p = stage.plan.prediction
    table = _table("bytes per device", "", "", "largest", align=("left", "right", "right", "left"))
    found = tensors(stage)
    groups = {
        "parameters, optimizer": ("parameter", p.parameter_bytes + p.optimizer_bytes),
        "gradients": ("gradient", p.gradient_bytes),
        f"saved, {p.in_flight} in flight": ("saved", p.saved_bytes * p.in_flight),
    }
    for label, (kind, nbytes) in groups.items():
        names = _largest([t for t in found if t.kind == kind])
        table.add_row(label, bytes_text(nbytes), percent_text(nbytes / p.peak_bytes), names)
    phase, alive = _peak(stage)
    names = ", ".join(f"{name} {bytes_text(n)}" for name, n in alive[:3])
    share = percent_text(p.transient_bytes / p.peak_bytes)
    label = f"transient (alive in {phase})"
    table.add_row(label, bytes_text(p.transient_bytes), share, names)
    return table


def _largest(found: Sequence[Tensor]) -> str:
    """The largest groups of equal tensors of different blocks."""
    groups: dict[str, list[Tensor]] = {}
    for t in found:
        path = parameter_pattern("", t.path)
        value = operator_family(t.name.removesuffix(SAVE_SUFFIX).partition(".")[0])
        name = f"{value} in {path}" if t.kind == "saved" and path else path or t.name
        groups.setdefault(name, []).append(t)
    ranked = sorted(groups.items(), key=lambda item: -sum(t.nbytes for t in item[1]))
    return ", ".join(
        f"{name} {f'{len(ts)} x ' if len(ts) > 1 else ''}{bytes_text(ts[0].nbytes)}"
        for name, ts in ranked[:_LARGEST]
    )


def _peak(stage: ExplainedStage) -> tuple[Phase, list[tuple[str, float]]]:
    """What is alive, beyond what is saved, in the phase that holds most."""
    saves = {t.name for t in tensors(stage) if t.kind == "saved"}
    saved = saves | {name.removesuffix(SAVE_SUFFIX) for name in saves}
    phases = {}
    for phase in Phase:
        alive = [
            (a.value or "inside an operator", a.nbytes)
            for a in at_peak(stage, phase)
            if a.value not in saved and a.nbytes
        ]
        phases[phase] = alive
    worst = max(phases, key=lambda phase: sum(n for _, n in phases[phase]))
    return worst, phases[worst]


def _operator_table(stage: ExplainedStage) -> Table:
    """Operators of one kind in equal modules of different blocks are one row."""
    table = _table(
        "operators", "module", "strategy", "count", "compute", "reshards", align=("left",) * 3
    )
    groups: dict[tuple[str, str, str], list[OperatorCost]] = {}
    for cost in operator_costs(stage):
        key = (operator_family(cost.name), parameter_pattern("", cost.module), cost.strategy)
        groups.setdefault(key, []).append(cost)

    def seconds(costs: Iterable[OperatorCost]) -> tuple[float, float]:
        pairs = [(c.seconds, c.reshard_s) for c in costs]
        return sum(own for own, _ in pairs), sum(reads for _, reads in pairs)

    ranked = sorted(groups.items(), key=lambda item: -sum(seconds(item[1])))
    for key, costs in ranked[:_ROWS]:
        table.add_row(*key, str(len(costs)), *map(seconds_text, seconds(costs)))
    rest = [cost for _, costs in ranked[_ROWS:] for cost in costs]
    if rest:
        table.add_row("... others", "", "", str(len(rest)), *map(seconds_text, seconds(rest)))
    return table


def decisions_report(decisions: Sequence[Decision]) -> RenderableType:
    """Decisions that read the same are one, with all their names."""
    groups: dict[object, list[Decision]] = {}
    for d in decisions:
        numbers = tuple((a.text, f"{a.seconds:.3g}", round(a.nbytes)) for a in d.alternatives)
        groups.setdefault((d.stage, d.kind, d.chosen, f"{d.seconds:.3g}", numbers), []).append(d)
    parts: list[RenderableType] = []
    for members in islice(groups.values(), _DECISIONS):
        parts += [_decision_title(members), _decision_table(members[0]), Text()]
    if len(groups) > _DECISIONS:
        more = sum(len(m) for m in islice(groups.values(), _DECISIONS, None))
        parts.append(Text(f"... and {more} more that match: give a longer pattern", "dim"))
    return Group(*parts)


def _decision_title(members: Sequence[Decision]) -> Text:
    first = members[0]
    names = first.name if len(members) == 1 else f"{first.name} and {len(members) - 1} alike"
    return Text.assemble(
        (f"{first.kind} {names}", "bold"), f" ({first.detail}), stage {first.stage}"
    )


def _decision_table(first: Decision) -> Table:
    table = _table("choice", "seconds per step", "bytes", "")
    chosen = [seconds_text(first.seconds), bytes_text(first.nbytes), "chosen"]
    table.add_row(_chosen_text(first.chosen), *chosen, style="bold green")
    for other in first.alternatives[:_ALTERNATIVES]:
        seconds, nbytes = _signed_seconds(other.seconds), _signed_bytes(other.nbytes)
        table.add_row(_chosen_text(other.text), seconds, nbytes, "")
    rest = len(first.alternatives) - _ALTERNATIVES
    if rest > 0:
        table.add_row(f"... and {rest} that cost more", "", "", "")
    if first.forbidden:
        table.add_row(f"{first.forbidden} that the choices around it forbid", "", "", "")
    return table


def _chosen_text(text: str) -> str:
    """ "S0 at rest, R in the step" of "S0 / R"."""
    rest, slash, step = text.partition(" / ")
    if not slash:
        return "replicated" if set(text.split()) <= {"-"} else text
    return f"{rest} at rest" + ("" if rest == step else f", {step} in the step")


def _signed_seconds(seconds: float) -> str:
    if abs(seconds) < _LEAST_S:
        return "same"
    return ("-" if seconds < 0 else "+") + seconds_text(abs(seconds))


def _signed_bytes(nbytes: float) -> str:
    if abs(nbytes) < 1:
        return "same"
    return ("-" if nbytes < 0 else "+") + bytes_text(abs(nbytes))


def _table(*columns: str, align: Sequence[str] = ("left",)) -> Table:
    """align: of the first columns; the others are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim italic")
    for index, column in enumerate(columns):
        left = index < len(align) and align[index] == "left"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


# ---- --json


def explain_record(
    plan: ParallelPlan, stages: Sequence[ExplainedStage], decisions: Sequence[Decision]
) -> dict[str, Any]:
    """The same as numbers; seconds and bytes per device. decisions: of the pattern, if any."""
    return {
        "binding": list(binding(plan, stages)),
        "stages": [_stage_record(stage) for stage in stages],
        "decisions": [_decision_record(d) for d in decisions],
    }


def _stage_record(stage: ExplainedStage) -> dict[str, Any]:
    spent, p = ledger(stage), stage.plan.prediction
    phase, alive = _peak(stage)
    return {
        "mesh": list(stage.plan.axis_sizes),
        "seconds_per_microbatch": {k.value: v for k, v in spent.items() if k not in ONCE_PER_STEP},
        "seconds_per_step": {k.value: v for k, v in spent.items() if k in ONCE_PER_STEP},
        "bytes": {
            "parameters": p.parameter_bytes,
            "optimizer": p.optimizer_bytes,
            "gradients": p.gradient_bytes,
            "saved": p.saved_bytes * p.in_flight,
            "transient": p.transient_bytes,
        },
        "tensors": [
            {
                "kind": t.kind,
                "name": t.name,
                "path": t.path,
                "layout": t.layout,
                "bytes": t.nbytes,
            }
            for t in tensors(stage)[: 4 * _ROWS]
        ],
        "alive_at_peak": {
            "phase": phase.value,
            "values": [{"name": name, "bytes": nbytes} for name, nbytes in alive[: 4 * _ROWS]],
        },
        "operators": [
            {
                "name": c.name,
                "overload": c.overload,
                "module": c.module,
                "strategy": c.strategy,
                "seconds": c.seconds,
                "reshard_seconds": c.reshard_s,
            }
            for c in operator_costs(stage)[: 4 * _ROWS]
        ],
    }


def _decision_record(decision: Decision) -> dict[str, Any]:
    return {
        "stage": decision.stage,
        "kind": decision.kind,
        "name": decision.name,
        "detail": decision.detail,
        "chosen": decision.chosen,
        "seconds": decision.seconds,
        "bytes": decision.nbytes,
        "forbidden": decision.forbidden,
        "alternatives": [
            {"choice": a.text, "seconds": a.seconds, "bytes": a.nbytes}
            for a in decision.alternatives
        ],
    }
