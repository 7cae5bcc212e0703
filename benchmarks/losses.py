"""Loss curves on real text: autopar beside FSDP2, from the same weights on the same batches.

    python -m benchmarks.losses --steps 200 --write             # two GPUs
    python -m benchmarks.losses --case gpt-tiny --backend gloo --steps 20

Tokens are bytes of the sources of Python's library, dropout is off. Two runs in bfloat16 are never
equal: how far apart two baselines are, which differ only in how they sum and round, is the
yardstick for autopar's distance from the reference. Allocated memory after each step shows what a
step leaves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autopar.report.units import bytes_text
from benchmarks import environment, speed
from benchmarks.run import RESULTS
from benchmarks.suites import select

REFERENCE = "zero-2"
RUNNERS = f"autopar; {REFERENCE}; zero-3; ddp"
_STARTS = 4
_ENDS = 10  # steps at each end of which memory is compared
_COLOURS = ("#c0392b", "#2c3e50", "#2980b9", "#27ae60", "#8e44ad")


def distances(curve: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """The largest and the root mean square difference."""
    gaps = [abs(a - b) for a, b in zip(curve, reference, strict=True)]
    return max(gaps), math.sqrt(sum(gap * gap for gap in gaps) / len(gaps))


def growth(allocated: Sequence[int]) -> float:
    """Bytes by which the last steps have more than the first; the very first do not count: they
    make the optimizer's states, and capture a CUDA graph."""
    steps = allocated[_STARTS:]
    count = min(_ENDS, len(steps))
    return (sum(steps[-count:]) - sum(steps[:count])) / count if count else 0.0


def measure(
    case: Any, settings: Mapping[str, Any], place: speed.Place
) -> Iterator[dict[str, dict[str, Any]]]:
    """Curves by runner, or the error of each that failed: all that there are, after each."""
    runners: dict[str, dict[str, Any]] = {}
    while left := [name for name in settings["runners"] if name not in runners]:
        request = {**settings, "task": "losses", "case": case.name, "runners": left}
        for finished in speed.run_job(request, place):
            runners |= finished
            yield runners


def summarise(runners: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each curve against the reference's."""
    curves = {name: r["losses"] for name, r in runners.items() if "losses" in r}
    found = {}
    for name, curve in curves.items():
        found[name] = {
            "first": curve[0],
            "last": curve[-1],
            "growth_bytes": growth(runners[name]["allocated_bytes"]),
        }
        if REFERENCE in curves:
            largest, rms = distances(curve, curves[REFERENCE])
            found[name] |= {"largest_difference": largest, "rms_difference": rms}
    return found


def markdown(record: Mapping[str, Any]) -> str:
    header = ("runner", "first loss", "last loss", "largest difference", "RMS difference", "memory")
    lines = [
        f"# Loss curves: {record['case']}",
        "",
        f"- commit {record['commit']}; {record['date']}",
        f"- command: `{record['command']}`",
        f"- {record['steps']} steps of AdamW, dropout off, bytes of Python's library; differences"
        f" from {REFERENCE}; memory: what the last {_ENDS} steps have more than the first",
        "",
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
    ]
    for name, facts in record["summary"].items():
        gaps = [f"{facts[k]:.2e}" if k in facts else "" for k in _GAPS]
        cells = (name, f"{facts['first']:.4f}", f"{facts['last']:.4f}", *gaps)
        grown = facts["growth_bytes"]
        lines.append(f"| {' | '.join(cells)} | {'-' * (grown < 0)}{bytes_text(abs(grown))} |")
    for name, runner in record["runners"].items():
        if "error" in runner:
            lines += ["", f"- {name}: {runner['error'].splitlines()[0]}"]
    return "\n".join(lines) + "\n"


_GAPS = ("largest_difference", "rms_difference")


def svg(curves: Mapping[str, Sequence[float]], width: int = 720, height: int = 360) -> str:
    """All curves over the steps."""
    highest = max(max(curve) for curve in curves.values())
    lowest = min(min(curve) for curve in curves.values())
    steps = max(len(curve) for curve in curves.values())
    left, low, high = 50, height - 30, 20

    def point(step: int, loss: float) -> str:
        x = left + (width - left - 10) * step / max(1, steps - 1)
        y = high + (low - high) * (highest - loss) / max(1e-12, highest - lowest)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="5" y="{high + 4}">{highest:.2f}</text>',
        f'<text x="5" y="{low + 4}">{lowest:.2f}</text>',
        f'<text x="{width - 90}" y="{height - 8}">step {steps}</text>',
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(point(step, loss) for step, loss in enumerate(curve))
        dash = f' stroke-dasharray="{4 * number},{3 * number}"' if number else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"{dash}/>'
        )
        y = high + 16 * number
        parts.append(f'<text x="{width - 160}" y="{y + 4}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="gpt-124m-b16", help="a language model of suite speed")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--backend", choices=tuple(speed.PRECISIONS), default="nccl")
    parser.add_argument("--runners", default=RUNNERS, help="names separated by semicolons")
    parser.add_argument("--gpus", default="", help="indices, such as 2,3; all if empty")
    parser.add_argument("--turns", type=Path, help="lock file of runs that share the GPUs")
    parser.add_argument("--seconds", type=float, default=speed.RUNNER_LIMIT_S, help="of a runner")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results with --write")
    parser.add_argument("--write", action="store_true", help="JSON, markdown and SVG")
    args = parser.parse_args()
    (case,) = select("speed", args.case)
    settings = speed.settings(
        devices=args.devices,
        backend=args.backend,
        steps=args.steps,
        warmup=1,
        runners=args.runners,
        runner_limit_s=args.seconds,
    )
    gpus = tuple(int(index) for index in args.gpus.split(",") if index) or None
    facts = {
        "case": case.name,
        "steps": args.steps,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": environment.commit(),
        "command": " ".join(["python -m benchmarks.losses", *sys.argv[1:]]),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "settings": settings,
    }
    folder = args.out or (RESULTS if args.write else None)
    record: dict[str, Any] = {}
    for runners in measure(case, settings, speed.Place(gpus, turns=args.turns)):
        record = {**facts, "summary": summarise(runners), "runners": runners}
        name, found = list(runners.items())[-1]
        print(f"{name}: {_line(found)}", flush=True)
        if folder is not None:
            _write(folder, record)
    print(markdown(record))
    if folder is not None:
        print(f"Results: {folder / _stem(record)}.json, .md, .svg")


def _line(runner: Mapping[str, Any]) -> str:
    if "error" in runner:
        return str(runner["error"]).splitlines()[0]
    curve = runner["losses"]
    return f"{len(curve)} steps, loss {curve[0]:.4f} -> {curve[-1]:.4f}"


def _stem(record: Mapping[str, Any]) -> str:
    return f"losses-{record['case']}-{record['date'].replace('-', '')}"


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    """After each runner, so that none is lost with a later one."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(record)
    (folder / f"{stem}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(record), encoding="utf-8")
    curves = {name: r["losses"] for name, r in record["runners"].items() if "losses" in r}
    if curves:
        (folder / f"{stem}.svg").write_text(svg(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
