"""What is measured: autopar's own plan, plans that are forced on it, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from autopar.plan import ParallelPlan, Remat
from benchmarks.baselines import BASELINES
from benchmarks.speed import OURS
from benchmarks.suites import SpeedCase
from benchmarks.training import Job, Step, make_optimizer

Facts = dict[str, Any]  # about a runner: its plan, what it predicted
Maker = Callable[[Job, SpeedCase, str], tuple[Step, Facts]]

# Other plans than the search's own: SearchOptions beside the case's.
FORCED: Mapping[str, Mapping[str, Any]] = {
    "one stage": {"num_stages": 1, "num_microbatches": 1},
    "two stages": {"num_stages": 2},
    "recompute all": {"remat": Remat.FULL, "num_stages": 1},
    "recompute nothing": {"remat": Remat.NONE, "num_stages": 1},
    "two microbatches": {"num_microbatches": 2, "num_stages": 1},
}


def names(devices: int) -> list[str]:
    """All runners for so many devices, ours first."""
    single = ("torch.compile", "torch.compile, reduce-overhead")
    baselines = [n for n in BASELINES if (n in single) == (devices == 1)]
    forced = [f"{OURS}: {name}" for name in FORCED] if devices > 1 else []
    return [OURS, *baselines, *forced]


def maker(name: str) -> Maker:
    if name == OURS:
        return lambda job, case, precision: ours(job, precision, case.options)
    if name.startswith(f"{OURS}: "):
        pins = FORCED[name.removeprefix(f"{OURS}: ")]
        return lambda job, case, precision: ours(job, precision, {**case.options, **pins})
    return lambda job, case, precision: (BASELINES[name](job), {})


def ours(job: Job, precision: str, options: Mapping[str, Any]) -> tuple[Step, Facts]:
    from autopar.api import parallelize
    from autopar.graph.precision import Precision
    from autopar.options import SearchOptions

    parallel = parallelize(
        job.build(),
        job.batch,
        options=SearchOptions(**options),
        precision=Precision.parse(precision),
    )
    optimizer = make_optimizer(parallel.parameters(), job.device)

    def step() -> Tensor:
        loss: Tensor = parallel.train_step(job.batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, plan_facts(parallel.plan)


def plan_facts(plan: ParallelPlan) -> Facts:
    from autopar.report.text import plan_text

    return {
        "plan": plan_text(plan),
        "predicted_step_s": plan.step_s,
        "predicted_peak_bytes": max(stage.prediction.peak_bytes for stage in plan.stages),
    }
