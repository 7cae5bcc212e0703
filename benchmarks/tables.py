"""Results as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autopar.report.units import bytes_text, percent_text, seconds_text

Record = Mapping[str, Any]


def markdown(record: Record) -> str:
    """The whole file: where it was measured, a table, the plans, the failures."""
    rows = {"plan": _plan_rows, "speed": _speed_rows}[record["suite"]]
    parts = [
        f"# {record['suite']}: {record['date'][:10]}",
        _where(record),
        rows([e for e in record["entries"] if e["status"] == "ok"]),
    ]
    failed = [e for e in record["entries"] if e["status"] != "ok"]
    if failed:
        parts.append("## Failed")
        parts += [f"- {e['case']}: {_first_line(e['error'])}" for e in failed]
    parts += [_plan_section(e) for e in record["entries"] if e["status"] == "ok"]
    return "\n\n".join(parts) + "\n"


def _where(record: Record) -> str:
    hardware, versions = record["hardware"], record["versions"]
    gpu = f"{hardware['gpus']} x {hardware['gpu']}, " if "gpu" in hardware else ""
    texts = [f"{name} {version}" for name, version in versions.items()]
    return "\n".join(
        (
            f"- commit {record['commit']}",
            f"- hardware: {gpu}{hardware['cores']} cores of {hardware['cpu']},"
            f" {bytes_text(hardware['memory_bytes'])}",
            f"- versions: {', '.join(texts)}",
            f"- command: `{record['command']}`",
        )
    )


def _plan_rows(entries: Sequence[Record]) -> str:
    passes = list(dict.fromkeys(name for e in entries for name in e["result"]["passes_s"]))
    header = ["case", "cluster", "batch", "planning (median)", "min - max", "runs", *passes]
    lines = []
    for entry in entries:
        r = entry["result"]
        t = r["plan_s"]
        lines.append(
            [
                entry["case"],
                r["cluster"],
                str(r["batch"]),
                seconds_text(t["median"]),
                f"{seconds_text(t['minimum'])} - {seconds_text(t['maximum'])}",
                str(t["count"]),
                *(seconds_text(r["passes_s"].get(name, 0.0)) for name in passes),
                bytes_text(r["rss_bytes"]),
                seconds_text(r["predicted_step_s"]),
                percent_text(r["gap"]),
            ]
        )
    note = "Planning is capture and search in a fresh process, after imports and building on meta."
    return _table([*header, "peak RSS", "predicted step", "gap"], lines) + "\n\n" + note


def _speed_rows(entries: Sequence[Record]) -> str:
    header = [
        "case",
        "devices",
        "backend, dtype",
        "runner",
        "median step",
        "IQR",
        "rate",
        "peak memory",
        "speed / best baseline",
    ]
    lines = []
    for entry in entries:
        r = entry["result"]
        for name, runner in r["runners"].items():
            lead = [entry["case"], str(r["devices"]), f"{r['backend']}, {r['dtype']}", name]
            if "error" in runner:
                lines.append([*lead, _first_line(runner["error"]), "", "", "", ""])
                continue
            t, ratio = runner["step_s"], runner["ratio"]
            lines.append(
                [
                    *lead,
                    seconds_text(t["median"]),
                    seconds_text(t["q3"] - t["q1"]),
                    f"{runner['items_per_s']:,.0f} {r['items']}/s",
                    bytes_text(runner["peak_bytes"]),
                    "" if ratio is None else f"{ratio:.2f}",
                ]
            )
    return _table(header, lines)


def _plan_section(entry: Record) -> str:
    result = entry["result"]
    plan = result.get("plan") or result.get("runners", {}).get("autopar", {}).get("plan")
    return f"## Plan of {entry['case']}\n\n```\n{plan.rstrip()}\n```" if plan else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join((line(header), line(["---"] * len(header)), *map(line, rows)))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"
