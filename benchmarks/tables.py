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
        rows([e for e in record["entries"] if "result" in e]),
    ]
    failed = [e for e in record["entries"] if e["status"] == "failed"]
    if failed:
        parts.append("## Failed")
        parts += [f"- {e['case']}: {_first_line(e['error'])}" for e in failed]
    parts += [_plan_section(e) for e in record["entries"] if "result" in e]
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
        "MFU",
        "peak memory",
        "predicted step, memory",
        "setup, first step",
        "compute, exposed communication, idle",
        "speed / best baseline",
    ]
    lines = []
    for entry in entries:
        r = entry["result"]
        for name, runner in r["runners"].items():
            lead = [entry["case"], str(r["devices"]), f"{r['backend']}, {r['dtype']}", name]
            if "error" in runner:
                lines.append([*lead, _first_line(runner["error"]), *[""] * (len(header) - 5)])
                continue
            t, ratio = runner["step_s"], runner["ratio"]
            lines.append(
                [
                    *lead,
                    seconds_text(t["median"]),
                    seconds_text(t["q3"] - t["q1"]),
                    f"{runner['items_per_s']:,.0f} {r['items']}/s",
                    percent_text(runner["mfu"]) if runner.get("mfu") else "",
                    bytes_text(runner["peak_bytes"]),
                    _predicted(runner),
                    f"{seconds_text(runner['setup_s'])}, {seconds_text(runner['first_step_s'])}"
                    if "first_step_s" in runner
                    else "",
                    _profile_text(runner.get("profile") or {}),
                    "" if ratio is None else f"{ratio:.2f}",
                ]
            )
    return "\n\n".join([_case_rows(entries), _table(header, lines)])


def _predicted(runner: Record) -> str:
    if "predicted_step_s" not in runner:
        return ""
    step, peak = runner["predicted_step_s"], runner["predicted_peak_bytes"]
    return f"{seconds_text(step)}, {bytes_text(peak)}"


def _profile_text(profile: Record) -> str:
    keys = ("compute_ms", "exposed_communication_ms", "idle_ms")
    return ", ".join(seconds_text(profile[k] / 1e3) for k in keys) if keys[0] in profile else ""


def _case_rows(entries: Sequence[Record]) -> str:
    """A row per case: ours beside the best baseline, and whether the planner chose well."""
    header = ["case", "autopar", "best baseline", "speed / best baseline"]
    header += ["fastest plan measured", "the planner's within 3 % of it"]
    lines = []
    for entry in entries:
        r = entry["result"]
        best, fastest = r.get("best_baseline"), r.get("fastest_plan")
        ours = r["runners"].get("autopar", {})
        close = r.get("pick_is_close")
        lines.append(
            [
                entry["case"],
                _median_text(ours),
                f"{best}, {_median_text(r['runners'][best])}" if best else "",
                f"{ours['ratio']:.3f}" if ours.get("ratio") else "",
                f"{fastest}, {_median_text(r['runners'][fastest])}" if fastest else "",
                "" if close is None else "yes" if close else "no",
            ]
        )
    return _table(header, lines)


def _median_text(runner: Record) -> str:
    return seconds_text(runner["step_s"]["median"]) if "step_s" in runner else ""


def short(record: Record) -> str:
    """A line per runner, for the end of a log."""
    lines = []
    for entry in record["entries"]:
        result = entry.get("result") or {}
        gpus = result.get("gpus")
        where = "" if gpus is None else f" (GPUs {', '.join(map(str, gpus))})"
        best = result.get("best_baseline")
        lines.append(f"{entry['case']}{where}: {entry['status']}, best baseline {best}")
        if entry["status"] == "failed":
            lines.append(f"  {_first_line(entry['error'])[:300]}")
        for name, runner in result.get("runners", {}).items():
            lines.append(f"  {name:34} {runner_text(runner)}")
    return "\n".join(lines)


def runner_text(runner: Record) -> str:
    """ "273.8 ms +- 0.4, MFU 45.0 %, 37.2 GiB, x 1.01"."""
    if "error" in runner:
        return _first_line(runner["error"])[:200]
    t = runner["step_s"]
    parts = [f"{1e3 * t['median']:.1f} ms +- {1e3 * (t['q3'] - t['q1']) / 2:.1f}"]
    if runner.get("mfu"):
        parts.append(f"MFU {percent_text(runner['mfu'])}")
    parts.append(bytes_text(runner["peak_bytes"]))
    if runner.get("ratio") is not None:
        parts.append(f"x {runner['ratio']:.3f}")
    if "predicted_step_s" in runner:
        parts.append(f"predicted {_predicted(runner)}")
    parts.append(f"loss {runner['first_loss']:.4f} -> {runner['last_loss']:.4f}")
    parts.append(f"ready after {runner['setup_s'] + runner.get('first_step_s', 0.0):.0f} s")
    if "compute_ms" in (profile := runner.get("profile") or {}):
        parts.append(
            f"compute {profile['compute_ms']:.1f}, exposed communication"
            f" {profile['exposed_communication_ms']:.1f}, idle {profile['idle_ms']:.1f} ms"
        )
    return ", ".join(parts)


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
