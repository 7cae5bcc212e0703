"""The same plan on every machine: hashes of graphs and plans, to be compared between two of them.

    python -m benchmarks.fingerprints --out here.json           # on one machine
    python -m benchmarks.fingerprints --against here.json       # on another one
    PYTHONHASHSEED=1 python -m benchmarks.fingerprints --against here.json

Of each model and cluster: the fingerprint of the captured graph, a hash of what the plan decides
(no predicted seconds or bytes in it), and one of all bytes of the plan's file, which leaves out the
seconds that the search took. Another release of torch may capture another graph, and then another
plan is no fault: only plans for equal graphs are compared. The exit code is 1 where these differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autopar.api import plan_model
from autopar.graph.precision import Precision
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan
from benchmarks import environment, jobs
from benchmarks.forced import table_text
from benchmarks.suites import HF_GPT2, build
from cost_models import Cluster


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    cluster: str
    rows: int
    precision: str = "model"

    def __str__(self) -> str:
        return f"{self.model} on {self.cluster}"


CASES = (
    Case("gpt-tiny", "cpu:1x4", 8),
    Case("llama-tiny", "h100:2x2", 8),
    Case("moe-tiny", "v100:1x4", 8),
    Case(HF_GPT2, "h100:1x8", 64),
    Case(HF_GPT2, "v100:2x4", 16),
    Case("llama-8l", "h100:1x2", 8, "bf16"),
    Case("llama-3-8b", "a100:2x8", 32, "bf16"),
    Case("moe-380m", "v100:1x8", 32),
    Case("gpt-1.3b", "a100:4x8", 64, "bf16"),
)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hashes, in hex. step_s: predicted, to all digits."""

    case: str
    graph: str
    decisions: str
    plan: str
    step_s: str


def fingerprint(case: Case) -> Fingerprint:
    with torch.device("meta"):
        model, batch = build(case.model, case.rows)
    plan, _ = plan_model(
        model,
        batch,
        Cluster.parse(case.cluster),
        precision=Precision.parse(case.precision),
        options=SearchOptions(cache=False, time_limit_s=3600.0),
    )
    return of_plan(str(case), plan)


def of_plan(case: str, plan: ParallelPlan) -> Fingerprint:
    record = plan.to_json()
    decided = _without_numbers({k: v for k, v in record.items() if k != "search"})
    return Fingerprint(case, plan.graph, _hash(decided), _hash(record), plan.step_s.hex())


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _without_numbers(value: Any) -> Any:
    """The record without what is predicted: floats."""
    if isinstance(value, dict):
        return {k: _without_numbers(v) for k, v in value.items() if not isinstance(v, float)}
    return [_without_numbers(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Comparison:
    """Names of cases."""

    equal: tuple[str, ...]
    other_graphs: tuple[str, ...]
    other_figures: tuple[str, ...]  # the same decisions, predicted otherwise
    other_plans: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return bool(self.other_figures or self.other_plans)


def comparison(ours: Sequence[Fingerprint], theirs: Sequence[Fingerprint]) -> Comparison:
    known = {f.case: f for f in theirs}
    found: dict[str, list[str]] = {}
    for mine in ours:
        other = known.get(mine.case)
        if other is None:
            kind = "missing"
        elif mine.graph != other.graph:
            kind = "other_graphs"
        elif mine.plan == other.plan:
            kind = "equal"
        else:
            kind = "other_figures" if mine.decisions == other.decisions else "other_plans"
        found.setdefault(kind, []).append(mine.case)
    kinds = Comparison.__dataclass_fields__
    return Comparison(**{kind: tuple(found.get(kind, ())) for kind in kinds})


def comparison_text(found: Comparison, theirs: dict[str, Any]) -> str:
    lines = [f"against {theirs['versions']}:"]
    sentences = (
        (found.equal, "the same graph and the same bytes of the plan"),
        (found.other_graphs, "another graph was captured: its plan cannot be compared"),
        (found.other_figures, "DIFFERENT FIGURES: the same decisions, predicted otherwise"),
        (found.other_plans, "DIFFERENT PLANS of the same graph"),
        (found.missing, "not in that file"),
    )
    lines += [f"- {text}: {', '.join(cases)}" for cases, text in sentences if cases]
    return "\n".join(lines)


def line(found: Fingerprint) -> str:
    return " ".join(asdict(found).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", metavar="MODEL", help="all by default")
    parser.add_argument("--against", type=Path, metavar="FILE", help="of another machine")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON for --against")
    jobs.add_arguments(parser, minutes=60.0, limit_s=1800.0)
    args = parser.parse_args()
    jobs.import_all()
    cases = [c for c in CASES if args.cases is None or c.model in args.cases]
    done = jobs.compared(fingerprint, cases, args, line)
    record = {
        "command": jobs.command("fingerprints"),
        **jobs.where(),
        "fingerprints": [asdict(f) for f in done.results],
    }
    header = ("case", "graph", "decisions", "plan", "step, s")
    print(table_text(header, [tuple(asdict(f).values()) for f in done.results]))
    version = torch.__version__.split("+")[0]
    out = environment.ROOT / "benchmarks" / "results" / f"fingerprints-torch-{version}.json"
    for path in filter(None, (args.out, out if args.write else None)):
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    differs = bool(done.failures)
    if args.against is not None:
        theirs = json.loads(args.against.read_text(encoding="utf-8"))
        found = comparison(done.results, [Fingerprint(**f) for f in theirs["fingerprints"]])
        print(comparison_text(found, theirs))
        differs |= found.differs
    sys.exit(differs)


if __name__ == "__main__":
    main()
