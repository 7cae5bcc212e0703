"""The outcome of `verify` as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.report.units import seconds_text
from autopar.verify import KINDS, Errors, VerifyReport

_LABELS = {
    "loss": "loss",
    "gradient": "gradients",
    "update": "updated parameters",
    "buffer": "buffers",
}


def verify_table(report: VerifyReport) -> RenderableType:
    """Largest relative error of each kind against each reference."""
    table = Table(title_justify="left", header_style="bold", caption_justify="left")
    for column in ("against", "what", "largest relative error", "where", "limit", ""):
        table.add_column(column, overflow="fold")
    against = "captured graph, one device" + (", in float64" if report.narrow else "")
    _add_rows(table, against, report.errors, report.limits)
    if report.eager is not None:
        limits = dict.fromkeys(KINDS, report.eager_tolerance)
        _add_rows(table, "eager model, dropout off", report.eager, limits)
    dropout = "with dropout" if report.dropout else "without dropout"
    done = f"one step, {report.dtype}, {dropout}, {report.num_gradients} gradients"
    verdict = ("agrees", "bold green") if report.ok else ("DISAGREES", "bold red")
    line = Text.assemble(verdict, f": {done}, in {seconds_text(report.seconds)}")
    if report.eager_skipped:
        line.append(f"\nNot compared with the eager model: {report.eager_skipped}.", "yellow")
    return Group(table, line)


def verify_record(report: VerifyReport) -> dict[str, object]:
    """For --json."""
    return {
        "ok": report.ok,
        "dtype": report.dtype,
        "dropout": report.dropout,
        "num_gradients": report.num_gradients,
        "seconds": report.seconds,
        "limits": dict(report.limits),
        "eager_tolerance": report.eager_tolerance,
        "errors": _errors_record(report.errors),
        "eager": None if report.eager is None else _errors_record(report.eager),
        "eager_skipped": report.eager_skipped,
    }


def _errors_record(errors: Errors) -> dict[str, object]:
    numbers: dict[str, object] = {kind: getattr(errors, kind) for kind in KINDS}
    return {**numbers, "worst": dict(errors.worst)}


def _add_rows(table: Table, against: str, errors: Errors, limits: Mapping[str, float]) -> None:
    for position, kind in enumerate(KINDS):
        error, limit = getattr(errors, kind), limits[kind]
        good = error <= limit
        table.add_row(
            against if position == 0 else "",
            _LABELS[kind],
            Text(f"{error:.2e}", "green" if good else "bold red"),
            errors.worst.get(kind, ""),
            f"{limit:.0e}",
            "ok" if good else "too large",
        )
