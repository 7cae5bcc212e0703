"""The matrix of models as docs/models.md: one row a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autopar.report.units import seconds_text
from autopar.verify import KINDS, TOLERANCES
from tests.zoo import ZOO

Cell = Mapping[str, Any]
_HEADER = (
    "model",
    "captures",
    "without a rule",
    "meshes of the search's pick",
    "operators sharded",
    "verifies",
    "worst error, float32",
    "worst error, float64",
    "against eager",
    "time",
)


def markdown(record: Mapping[str, Any]) -> str:
    """The whole file: what it says and where it was measured, the table, what fails, the models."""
    models: Mapping[str, Sequence[Cell]] = record["models"]
    good = [name for name, cells in models.items() if all(c["ok"] for c in cells)]
    checked = [c for cells in models.values() for c in cells if c.get("eager") is not None]
    like_eager = sum(c.get("eager_ok", True) for c in checked)
    lines = [
        "# Models",
        "",
        "Each model of `tests/zoo` is captured, planned for four devices, and one training step of",
        "the plan, optimizer included, is compared with the same step on one device. Three plans:",
        "the search's pick, one stage on all devices, two stages of two; each in float32 and",
        "float64. `autopar coverage MODEL` shows what of a model can be sharded.",
        "",
        f"- **{len(good)} of {len(models)} verify** under every plan that was run;"
        f" {like_eager} of {len(checked)} steps also agree with the user's own model in eager mode",
        f"- command: `{record['command']}` (rows merge: a model may be from an earlier run)",
        f"- commit: {', '.join(sorted({c['commit'] for cells in models.values() for c in cells}))}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in record['versions'].items())}",
        f"- machine: {record['hardware']['cores']} cores of {record['hardware']['cpu']}",
        f"- error: largest relative one of loss, gradients, updated parameters and buffers"
        f" (`autopar/verify.py`); tolerances {_tolerances()}. Eager: the user's own model with"
        " dropout 0, in either precision, at float32's tolerance",
        "",
        _row(_HEADER),
        "|---" * len(_HEADER) + "|",
        *(_row(_cells(name, cells)) for name, cells in models.items()),
    ]
    for title, key in (("What fails", "ok"), ("What differs from eager", "eager_ok")):
        failed = [
            f"- **{name}**, {cell['plan']} {cell.get('dtype', '')}: {cell.get('reason', '')}"
            for name, cells in models.items()
            for cell in cells
            if not cell.get(key, True)
        ]
        if failed:
            lines += ["", f"## {title}", "", *failed]
    lines += ["", "## The models", ""]
    lines += [f"- `{model.name}`: {model.summary}{_rows_note(model)}" for model in ZOO.values()]
    return "\n".join(lines) + "\n"


def _rows_note(model: Any) -> str:
    return "" if model.equal_rows else " (a microbatch's loss is not that of its rows alone)"


def _tolerances() -> str:
    return ", ".join(f"{limit:g} in {dtype}" for dtype, limit in TOLERANCES.items())


def _cells(name: str, cells: Sequence[Cell]) -> list[str]:
    capture = next((c for c in cells if c["plan"] == "capture"), {"ok": False})
    checked = [c for c in cells if "dtype" in c]
    agreed = sum(c["ok"] for c in checked)
    pick = next((c for c in checked if c["plan"] == "the search's pick" and "meshes" in c), {})
    eager = [c["eager"] for c in checked if c.get("eager") is not None]
    return [
        name,
        f"{capture['operators']} operators" if capture["ok"] else "NO",
        ", ".join(capture.get("fallbacks", ())) or ("none" if capture["ok"] else ""),
        pick.get("meshes", "-"),
        f"{pick['sharded']:.0%}" if pick else "-",
        f"{agreed} of {len(checked)}" + ("" if agreed == len(checked) else ": NO"),
        *(_largest(c for c in checked if c["dtype"] == dtype) for dtype in TOLERANCES),
        f"{max(eager):.1e}" if eager else "-",
        seconds_text(sum(c.get("seconds", 0.0) for c in cells)),
    ]


def _largest(cells: Iterable[Cell]) -> str:
    found = [cell[kind] for cell in cells for kind in KINDS if kind in cell]
    return f"{max(found):.1e}" if found else "-"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
