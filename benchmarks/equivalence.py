"""The same training run under different plans: losses must agree to fp32 rounding.

    python -m benchmarks.equivalence --steps 20              # 1 device, one stage of 2, 2 stages
    python -m benchmarks.equivalence --size tiny --steps 5   # on the CPU, in a minute

GPT-2 124M (Hugging Face, random weights by seed, dropout on) on byte-level text. Each plan runs in
a job of its own under torchrun, NCCL on CUDA, gloo on the CPU; the log goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "124m": {},
    "tiny": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 256},
}


@dataclass(frozen=True)
class Case:
    name: str
    processes: int
    stages: int


CASES = (Case("one-device", 1, 1), Case("one-stage", 2, 1), Case("two-stages", 2, 2))
MICROBATCHES = 2


def train(case: Case, size: str, steps: int, batch: int, sequence: int, out: Path) -> None:
    """One rank of one case; rank 0 writes losses, seconds and the plan."""
    import torch
    import transformers

    import autopar
    from autopar.runtime.peers import held_bytes
    from benchmarks.text import byte_batches

    torch.manual_seed(0)
    settings = dict(SIZES[size])
    if size != "124m":
        settings |= {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(use_cache=False, **settings)
    model = transformers.GPT2LMHeadModel(config).train()
    batches = byte_batches(batch, sequence, steps, 0)
    options = autopar.SearchOptions(num_stages=case.stages, num_microbatches=MICROBATCHES)
    example = {"input_ids": batches[0], "labels": batches[0]}
    parallel = autopar.parallelize(model, example, options=options)
    del model
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-4)
    device = next(parallel.parameters()).device
    losses, seconds = [], []
    for tokens in batches:
        tokens = tokens.to(device)
        start = time.perf_counter()
        loss = parallel.train_step({"input_ids": tokens, "labels": tokens})
        norm = parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))  # waits for the device
        seconds.append(time.perf_counter() - start)
        del norm
    if int(os.environ.get("RANK", "0")) == 0:
        cuda = device.type == "cuda"
        record = {
            "losses": losses,
            "seconds": seconds,
            "device": torch.cuda.get_device_name(device) if cuda else platform.processor(),
            "peak_bytes": torch.cuda.max_memory_allocated(device) + held_bytes() if cuda else None,
            "predicted_step_s": parallel.plan.step_s,
            "predicted_peak_bytes": max(s.prediction.peak_bytes for s in parallel.plan.stages),
            "meshes": [list(s.axis_sizes) for s in parallel.plan.stages],
            "stages": [[s.first_layer, s.last_layer] for s in parallel.plan.stages],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "parameters": {
                name: [p.rest, p.step]
                for stage in parallel.plan.stages
                for name, p in list(stage.parameters.items())[:6]
            },
        }
        out.write_text(json.dumps(record))


def run_case(case: Case, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One job under torchrun."""
    out = folder / f"{case.name}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(case.processes), "-m", "benchmarks.equivalence"]
    command += ["--case", case.name, "--size", arguments.size, "--steps", str(arguments.steps)]
    command += ["--batch", str(arguments.batch), "--sequence", str(arguments.sequence)]
    started = time.monotonic()
    subprocess.run([*command, "--out", str(out)], check=True, timeout=arguments.timeout)
    record: dict[str, Any] = json.loads(out.read_text())
    record["job_s"] = time.monotonic() - started
    return record


def relative_difference(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def report(records: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Markdown: the machine, a row per plan, the losses."""
    reference = records[CASES[0].name]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"# Equivalence of plans: GPT-2 {arguments.size}, fp32, dropout on",
        "",
        f"- machine: {platform.machine()}, {reference['device']}; torch {reference['torch']}, "
        f"transformers {reference['transformers']}",
        f"- commit: {commit or 'unknown'}; date: {datetime.now():%Y-%m-%d}",
        f"- command: `python -m benchmarks.equivalence {' '.join(sys.argv[1:])}`",
        f"- batch {arguments.batch} x {arguments.sequence} tokens, {MICROBATCHES} microbatches, "
        "AdamW 3e-4, gradients clipped at norm 1",
        "",
        "| plan | processes | stages | meshes | median ms | predicted ms | peak GiB "
        "| predicted GiB | largest relative difference of the losses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        r = records[case.name]
        ordered = sorted(r["seconds"][2:])
        median = ordered[len(ordered) // 2] * 1e3
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
        difference = relative_difference(r["losses"], reference["losses"])
        lines.append(
            f"| {case.name} | {case.processes} | {r['stages']} | {r['meshes']} | {median:.1f} | "
            f"{r['predicted_step_s'] * 1e3:.1f} | {peak} | "
            f"{r['predicted_peak_bytes'] / 2**30:.2f} | {difference:.1e} |"
        )
    lines += ["", "| step | " + " | ".join(c.name for c in CASES) + " |", "|---" * 4 + "|"]
    for step in range(arguments.steps):
        row = " | ".join(f"{records[c.name]['losses'][step]:.7f}" for c in CASES)
        lines.append(f"| {step} | {row} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per job")
    parser.add_argument("--case", help="internal: run one rank of this case")
    parser.add_argument("--out", type=Path, help="result file (with --case), else folder")
    arguments = parser.parse_args()
    if arguments.case:
        case = next(c for c in CASES if c.name == arguments.case)
        train(
            case,
            arguments.size,
            arguments.steps,
            arguments.batch,
            arguments.sequence,
            arguments.out,
        )
        return
    folder = arguments.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        records = {case.name: run_case(case, arguments, Path(scratch)) for case in CASES}
    text = report(records, arguments)
    stem = f"equivalence-{arguments.size}-{datetime.now():%Y%m%d}"
    (folder / f"{stem}.md").write_text(text)
    (folder / f"{stem}.json").write_text(json.dumps(records, indent=1) + "\n")
    print(text)
    worst = max(
        relative_difference(r["losses"], records[CASES[0].name]["losses"]) for r in records.values()
    )
    if not worst <= arguments.tolerance:
        sys.exit(f"the losses differ by {worst:.1e}, more than {arguments.tolerance:.0e}")


if __name__ == "__main__":
    main()
