"""What is measured: autopar's own plan, plans that are forced on it, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from autopar.api import detect_cluster, parallelize
from autopar.errors import NoFeasiblePlan
from autopar.graph.precision import Precision
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.report.text import plan_text
from autopar.runtime.module import ParallelModel
from autopar.schedule import ScheduleKind
from benchmarks.baselines import BASELINES
from benchmarks.handmade import Grid
from benchmarks.speed import OURS
from benchmarks.suites import SpeedCase
from benchmarks.told import told_plan
from benchmarks.training import Job, NotAvailable, Step, make_optimizer

Facts = dict[str, Any]  # about a runner: its plan, what it predicted
Maker = Callable[[Job, SpeedCase, str], tuple[Step, Facts]]

_NONE: Mapping[str, Any] = MappingProxyType({})

# Other plans than the search's own: SearchOptions beside the case's, or a recipe for two devices
# without the search.
FORCED: Mapping[str, Mapping[str, Any] | Grid] = {
    "zero-1": Grid(2, 1, 1, 1, Remat.NONE, "1"),
    "zero-2": Grid(2, 1, 1, 1, Remat.NONE, "2"),
    "zero-3": Grid(2, 1, 1, 1, Remat.NONE, "3"),
    "tensor parallel": Grid(1, 2, 1, 1, Remat.NONE),
    "one stage": {"num_stages": 1},
    "two stages": {"num_stages": 2, "schedule": ScheduleKind.ONE_F_ONE_B},
    "recompute all": {"remat": Remat.FULL, "num_stages": 1},
    "two microbatches": {"num_microbatches": 2, "num_stages": 1},
}

# The search's own plan, run in another way: options of `parallelize`.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "without peer copies": {"peer_copies": False},
    "without CUDA graphs": {"cuda_graph": False},
    "without tuned products": {"tune_products": False},
}


def names(devices: int) -> list[str]:
    """All runners for so many devices, ours first."""
    single = ("torch.compile", "torch.compile, reduce-overhead")
    baselines = [n for n in BASELINES if (n in single) == (devices == 1)]
    forced = [f"{OURS}: {name}" for name in (*FORCED, *WAYS)] if devices == 2 else []
    return [OURS, *baselines, *forced]


def is_plan(name: str) -> bool:
    """Whether it is the search's own plan or a forced one, not the same in another way."""
    return name in {OURS, *(f"{OURS}: {forced}" for forced in FORCED)}


def maker(name: str) -> Maker:
    if name == OURS:
        return _searched
    if name.startswith(f"{OURS}: "):
        short = name.removeprefix(f"{OURS}: ")
        if short in WAYS:
            return partial(_searched, way=WAYS[short])
        told = FORCED[short]
        if isinstance(told, Grid):
            return partial(_told, grid=told)
        return partial(_searched, pins=told)
    return lambda job, case, precision: (BASELINES[name](job), {})


def _searched(
    job: Job,
    case: SpeedCase,
    precision: str,
    pins: Mapping[str, Any] = _NONE,
    way: Mapping[str, Any] = _NONE,
) -> tuple[Step, Facts]:
    parallel = parallelize(
        job.build(),
        job.batch,
        options=SearchOptions(**{**case.options, **pins}),
        precision=Precision.parse(precision),
        **way,
    )
    return _stepped(job, parallel)


def _told(job: Job, case: SpeedCase, precision: str, grid: Grid) -> tuple[Step, Facts]:
    del case
    model = job.build()
    found: list[ParallelPlan | str] = [""]
    if job.rank == 0:
        cluster = detect_cluster(job.size)
        try:
            found[0] = told_plan(model, job.batch, cluster, grid, Precision.parse(precision))
        except NoFeasiblePlan as error:
            found[0] = str(error)
    dist.broadcast_object_list(found, device=job.device)
    if isinstance(found[0], str):
        raise NotAvailable(found[0])
    return _stepped(job, parallelize(model, job.batch, plan=found[0]))


def _stepped(job: Job, parallel: ParallelModel) -> tuple[Step, Facts]:
    optimizer = make_optimizer(parallel.parameters(), job.device)
    parallel.compile_ahead(job.batch)

    def step() -> Tensor:
        loss: Tensor = parallel.train_step(job.batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, plan_facts(parallel.plan)


def plan_facts(plan: ParallelPlan) -> Facts:
    return {
        "plan": plan_text(plan),
        "predicted_step_s": plan.step_s,
        "predicted_peak_bytes": max(stage.prediction.peak_bytes for stage in plan.stages),
    }
