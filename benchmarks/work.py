"""One rank of a job that measures training speed: `benchmarks.speed` starts it under torchrun."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.runtime.peers import held_bytes
from benchmarks import traces
from benchmarks.models import MODELS
from benchmarks.runners import Maker, maker
from benchmarks.speed import PRECISIONS
from benchmarks.suites import SPEED_CASES, SpeedCase, build, build_batch
from benchmarks.summary import summary
from benchmarks.text import byte_batches, library
from benchmarks.training import Job, NotAvailable, Step
from benchmarks.turns import Turns

_LEFT_OVER_BYTES = 2**30
_GRACE_S = 3.0  # for the other ranks to say what went wrong with them


def work(request: Mapping[str, Any], folder: Path) -> None:
    """The runners of the request, in order. Rank 0 writes a file after each; a rank that fails says
    why in one of its own, and ends. Ends early after a runner that leaves memory behind."""
    from autopar.runtime.launch import torchrun_world

    world = torchrun_world()
    if world is None:
        raise RuntimeError("start this with torchrun")
    case = next(c for c in SPEED_CASES if c.name == request["case"])
    task = _TASKS[request.get("task", "speed")]
    turns = Turns(request.get("turns"))
    torch.backends.cudnn.benchmark = True  # as scripts that train convolutional networks have it
    for number, name in enumerate(request["runners"]):
        faulthandler.dump_traceback_later(request["runner_limit_s"], exit=True)
        try:
            found = task(make_job(case, world.device, turns), name, case, request, turns)
        except NotAvailable as error:
            found = {"error": f"not available: {error}"}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            (folder / f"error-{world.rank}.txt").write_text(text, encoding="utf-8")
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            time.sleep(_GRACE_S)
            os._exit(1)  # without destructors: they might wait for the other ranks
        if world.rank == 0:
            draft = folder / "draft"
            draft.write_text(json.dumps({name: found}), encoding="utf-8")
            draft.replace(folder / f"done-{number:03d}.json")
        _clean(world.device)
        if _left_over(world.device) > _LEFT_OVER_BYTES:
            break
    faulthandler.cancel_dump_traceback_later()
    world.close()


def make_job(case: SpeedCase, device: torch.device, turns: Turns) -> Job:
    def model() -> torch.nn.Module:
        """Initialised where it is, by seed: the same on all ranks."""
        with turns.taken(), torch.device(device):
            return build(case.model, 1)[0]

    with torch.device("meta"):
        model_type = type(build(case.model, 1)[0])
    batch = build_batch(case.model, case.batch)
    on_gpu = device.type == "cuda"
    return Job(
        model,
        model_type,
        pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch),
        device,
        dist.get_rank(),
        dist.get_world_size(),
        half=on_gpu,
        compiled=on_gpu,
    )


def _timed(
    job: Job, name: str, case: SpeedCase, request: Mapping[str, Any], turns: Turns
) -> dict[str, Any]:
    _reset_peak(job.device)
    started = time.perf_counter()
    step, facts = _made(maker(name), job, case, request)
    _synchronize(job.device)
    setup = {
        "setup_s": time.perf_counter() - started,
        "setup_peak_bytes": int(_largest(_peak_bytes(job.device), job.device)),
    }
    with turns.taken():
        found = _steps(step, job, request)
        if job.device.type == "cuda":
            stem = "".join(c if c.isalnum() else "-" for c in f"{case.name}-{name}")
            found["profile"] = _profile(step, job, request.get("traces"), stem)
        del step
        _clean(job.device)
    return {**setup, **found, **facts}


def _steps(step: Step, job: Job, request: Mapping[str, Any]) -> dict[str, Any]:
    _reset_peak(job.device)
    started = time.perf_counter()
    losses = [_mean(step())]
    first_step_s = time.perf_counter() - started
    losses += [_mean(step()) for _ in range(request["warmup"] - 1)]
    seconds, made = _paced(step, job, request["steps"])
    times = [_largest(value, job.device) for value in seconds]
    losses += [_mean(loss) for loss in made]
    return {
        "step_s": summary(times).to_dict(),
        "peak_bytes": int(_largest(_peak_bytes(job.device), job.device)),
        "first_step_s": first_step_s,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses,
        "peak_flops": _peak_flops(job.device),
    }


def _made(
    make: Maker, job: Job, case: SpeedCase, request: Mapping[str, Any]
) -> tuple[Step, dict[str, Any]]:
    step, facts = make(job, case, PRECISIONS[request["backend"]])
    gc.collect()  # the whole model on each device, of which shards were made
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    return step, facts


def _trained(
    job: Job, name: str, case: SpeedCase, request: Mapping[str, Any], turns: Turns
) -> dict[str, Any]:
    """The loss of each step on another batch of text, and the memory allocated after it. Dropout is
    off. Bytes are taken modulo the vocabulary, for models that have a smaller one."""
    tokens_BS, targets_BS = job.batch
    (config,) = MODELS[case.model].build.args  # type: ignore[attr-defined]
    rows, length = tokens_BS.shape
    batches = byte_batches(rows, length + 1, request["steps"], 0, library())
    quiet = replace(job, build=lambda: job.build().eval())
    step, facts = _made(maker(name), quiet, case, request)
    curve = torch.zeros(request["steps"], dtype=torch.float64, device=job.device)
    allocated = []
    with turns.taken():
        for number, text in enumerate(batches):
            text = text.to(job.device) % config.vocab_size
            tokens_BS.copy_(text[:, :-1])  # what the step reads
            targets_BS.copy_(text[:, 1:])
            curve[number] = step()
            allocated.append(_allocated(job.device))
        dist.all_reduce(curve)
        del step
        _clean(job.device)
    return {"losses": (curve / job.size).tolist(), "allocated_bytes": allocated, **facts}


_TASKS = {"speed": _timed, "losses": _trained}


def _profile(step: Step, job: Job, folder: str | None, stem: str) -> dict[str, Any]:
    """Of a step of rank 0, behind another one, with which the host gets ahead of the GPU; every
    rank steps. With a folder its trace holds the host's side too, and stays."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA]
    if folder is not None:
        activities.append(ProfilerActivity.CPU)
        Path(folder).mkdir(parents=True, exist_ok=True)
    traces.mark()  # the first time a kernel is loaded, for which the host waits
    recorder = contextlib.nullcontext() if job.rank else profile(activities=activities)
    with recorder as recorded:
        step()
        traces.mark()
        step()
        _synchronize(job.device)
    if recorded is None:
        return {}
    path = Path(folder or os.environ.get("TMPDIR", "/tmp")) / f"{stem}-{os.getpid()}.json.gz"
    try:
        recorded.export_chrome_trace(str(path))
        return traces.analysis(traces.load(path))
    except (OSError, ValueError, RuntimeError) as error:  # the times are good without it
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if folder is None:
            path.unlink(missing_ok=True)
        else:
            path.replace(path.with_name(f"{stem}.json.gz"))


def _clean(device: torch.device) -> None:
    """What the last runner left: compiled code, graphs, memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        from torch._inductor import cudagraph_trees

        cudagraph_trees.reset_cudagraph_trees()
        torch.cuda.empty_cache()


def _left_over(device: torch.device) -> float:
    """Bytes on the GPU that has the most."""
    return _largest(_allocated(device), device) if device.type == "cuda" else 0.0


def _peak_flops(device: torch.device) -> float | None:
    """Of the datasheet, for bfloat16."""
    if device.type != "cuda":
        return None
    from autopar.api import detect_cluster
    from autopar.errors import OptionError

    try:
        return detect_cluster().groups[0].device.peak_flops["bfloat16"]
    except OptionError:
        return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _largest(value: float, device: torch.device) -> float:
    """Over all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _paced(step: Step, job: Job, steps: int) -> tuple[list[float], list[Tensor]]:
    """Seconds and loss of each step, one after the other as in training: the host does not wait
    for a GPU, which tells when it ends a step. The step before the first one counts for nothing:
    all ranks start it at once, with nothing to do yet."""
    ends: list[Any] = []
    losses = []
    dist.barrier()
    _synchronize(job.device)
    for _ in range(steps + 1):
        losses.append(step().detach().clone())
        if job.device.type == "cuda":
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())
    _synchronize(job.device)
    if job.device.type == "cuda":
        times = [one.elapsed_time(other) / 1e3 for one, other in itertools.pairwise(ends)]
    else:
        times = [other - one for one, other in itertools.pairwise(ends)]
    return times, losses


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


def _allocated(device: torch.device) -> int:
    """On the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + held_bytes()
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) + held_bytes())
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        return float(peaks[0]) * 1024
    except (OSError, IndexError):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), Path(sys.argv[2]))
