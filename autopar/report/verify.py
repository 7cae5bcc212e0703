"""The outcome of `verify` as a table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.report.units import seconds_text
from autopar.verify import Errors, VerifyReport

_KINDS = ("loss", "gradient", "update", "buffer")
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
    _add_rows(table, against, report.errors, report.tolerance)
    if report.eager is not None:
        _add_rows(table, "eager model, dropout off", report.eager, report.eager_tolerance)
    dropout = "with dropout" if report.dropout else "without dropout"
    done = f"one step, {report.dtype}, {dropout}, {report.num_gradients} gradients"
    verdict = ("agrees", "bold green") if report.ok else ("DISAGREES", "bold red")
    line = Text.assemble(verdict, f": {done}, in {seconds_text(report.seconds)}")
    return Group(table, line)


def verify_record(report: VerifyReport) -> dict[str, object]:
    """For --json."""
    return {
        "ok": report.ok,
        "dtype": report.dtype,
        "dropout": report.dropout,
        "num_gradients": report.num_gradients,
        "seconds": report.seconds,
        "tolerance": report.tolerance,
        "eager_tolerance": report.eager_tolerance,
        "errors": _errors_record(report.errors),
        "eager": None if report.eager is None else _errors_record(report.eager),
    }


def _errors_record(errors: Errors) -> dict[str, object]:
    numbers: dict[str, object] = {kind: getattr(errors, kind) for kind in _KINDS}
    return {**numbers, "worst": dict(errors.worst)}


def _add_rows(table: Table, against: str, errors: Errors, limit: float) -> None:
    for position, kind in enumerate(_KINDS):
        error = getattr(errors, kind)
        good = error <= limit
        table.add_row(
            against if position == 0 else "",
            _LABELS[kind],
            Text(f"{error:.2e}", "green" if good else "bold red"),
            errors.worst.get(kind, ""),
            f"{limit:.0e}",
            "ok" if good else "too large",
        )
