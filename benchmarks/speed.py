"""Training speed: autopar and the baselines, one after another in one job of torchrun.

A step is forward, backward and AdamW on the global batch. Its time is the slowest rank's, from a
barrier on. gloo runs on CPU processes in float32; NCCL on GPUs computes and reduces in bfloat16
with float32 parameters and states.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.baselines import BASELINES, Job, NotAvailable, Step, make_optimizer
from benchmarks.suites import SPEED_CASES, SpeedCase, build, items_per_batch
from benchmarks.summary import summary

OURS = "autopar"
_PRECISIONS = {"gloo": "model", "nccl": "bf16/bf16"}
_TIMEOUT_S = 3600


def measure(case: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One SpeedCase. settings: devices, backend, steps, warmup, and runners, if not all of them.
    RuntimeError if the job fails."""
    runners = _job({**settings, "case": case.name})
    per_step, kind = items_per_batch(case)
    times = {n: r["step_s"]["median"] for n, r in runners.items() if "step_s" in r}
    baselines = [t for name, t in times.items() if name != OURS]
    for name, median_s in times.items():
        runners[name]["items_per_s"] = per_step / median_s
        runners[name]["ratio"] = min(baselines) / median_s if baselines else None
    return {
        "model": case.model,
        "batch": case.batch,
        "devices": settings["devices"],
        "backend": settings["backend"],
        "dtype": _PRECISIONS[settings["backend"]],
        "items": str(kind),
        "runners": runners,
    }


def _job(request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same program on every device, through torchrun; what rank 0 wrote."""
    environment = dict(os.environ)
    if request["backend"] == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        threads = max(1, (os.cpu_count() or 1) // request["devices"])
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runners.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(request["devices"]), "-m", "benchmarks.speed"]
        done = subprocess.run(
            [*command, json.dumps(request), str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=environment,
        )
        if done.returncode or not path.exists():
            raise RuntimeError(f"exit code {done.returncode}:\n{done.stderr.strip()[-6000:]}")
        runners: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return runners


def work(request: Mapping[str, Any], path: Path) -> None:
    """What every process of the job does."""
    from autopar.runtime.launch import torchrun_world

    world = torchrun_world()
    if world is None:
        raise RuntimeError("start this with torchrun")
    case = next(c for c in SPEED_CASES if c.name == request["case"])
    precision = _PRECISIONS[request["backend"]]
    makers: dict[str, Callable[[Job], tuple[Step, str]]] = {
        OURS: lambda job: _ours(job, case, precision)
    }
    makers |= {name: _plain(maker) for name, maker in BASELINES.items()}
    makers = {name: makers[name] for name in request.get("runners") or makers}
    runners = {}
    for name, maker in makers.items():
        job = _fresh_job(case, world.device)
        _reset_peak(job.device)
        try:
            runners[name] = _timed(job, maker, request["warmup"], request["steps"])
        except (NotAvailable, torch.OutOfMemoryError) as error:
            runners[name] = {"error": f"{type(error).__name__}: {error}"}
        if world.rank == 0:  # what comes next may fail
            path.write_text(json.dumps(runners), encoding="utf-8")
        del job
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.close()


def _timed(
    job: Job, maker: Callable[[Job], tuple[Step, str]], warmup: int, steps: int
) -> dict[str, Any]:
    started = time.perf_counter()
    step, plan = maker(job)
    setup_s = time.perf_counter() - started
    losses = [_mean(step()) for _ in range(warmup)]
    times = []
    for _ in range(steps):
        dist.barrier()
        _synchronize(job.device)
        started = time.perf_counter()
        loss = step()
        _synchronize(job.device)
        times.append(_largest(time.perf_counter() - started, job.device))
        losses.append(_mean(loss))
    return {
        "step_s": summary(times).to_dict(),
        "peak_bytes": int(_largest(_peak_bytes(job.device), job.device)),
        "setup_s": setup_s,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "plan": plan,
    }


def _ours(job: Job, case: SpeedCase, precision: str) -> tuple[Step, str]:
    from autopar.api import parallelize
    from autopar.graph.precision import Precision
    from autopar.options import SearchOptions
    from autopar.report.text import plan_text

    options = SearchOptions(**case.options)
    parallel = parallelize(
        job.model, job.batch, options=options, precision=Precision.parse(precision)
    )
    optimizer = make_optimizer(parallel.parameters(), job.device)

    def step() -> Tensor:
        loss: Tensor = parallel.train_step(job.batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, plan_text(parallel.plan)


def _plain(maker: Callable[[Job], Step]) -> Callable[[Job], tuple[Step, str]]:
    return lambda job: (maker(job), "")


def _fresh_job(case: SpeedCase, device: torch.device) -> Job:
    model, batch = build(case.model, case.batch)
    placed = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    return Job(model.to(device), placed, device, dist.get_rank(), dist.get_world_size())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _largest(value: float, device: torch.device) -> float:
    """Over all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _mean(loss: Tensor) -> float:
    """Over all ranks: of the global batch, whatever part of it each rank trains on."""
    total = loss.detach().double().reshape(1).clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _reset_peak(device: torch.device) -> None:
    """On the CPU Linux forgets the peak of the resident set where /proc allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        return float(peaks[0]) * 1024
    except (OSError, IndexError):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), Path(sys.argv[2]))
