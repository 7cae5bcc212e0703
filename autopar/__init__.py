"""autopar: an auto-parallelization compiler for PyTorch training.

    parallel = autopar.parallelize(model, example_batch, memory_budget="70GiB")
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-4)
    for batch in loader:
        loss = parallel.train_step(batch)
        optimizer.step(); optimizer.zero_grad()

The names below are the public ones. They are imported on first use, so that `import autopar` is
quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import parallelize, plan_model
    from autopar.errors import AutoparError, NoFeasiblePlan
    from autopar.graph.capture import capture_graph
    from autopar.graph.precision import Precision
    from autopar.intraop.solver import Solver
    from autopar.options import SearchOptions
    from autopar.plan import ParallelPlan, Remat
    from autopar.planner import make_plan
    from autopar.runtime.module import ParallelModel
    from autopar.schedule import ScheduleKind
    from autopar.simulate import simulate
    from autopar.verify import verify_plan
    from cost_models import Cluster

_HOMES = {
    "AutoparError": "autopar.errors",
    "Cluster": "cost_models",
    "NoFeasiblePlan": "autopar.errors",
    "ParallelModel": "autopar.runtime.module",
    "ParallelPlan": "autopar.plan",
    "Precision": "autopar.graph.precision",
    "Remat": "autopar.plan",
    "ScheduleKind": "autopar.schedule",
    "SearchOptions": "autopar.options",
    "Solver": "autopar.intraop.solver",
    "capture_graph": "autopar.graph.capture",
    "make_plan": "autopar.planner",
    "parallelize": "autopar.api",
    "plan_model": "autopar.api",
    "simulate": "autopar.simulate",
    "verify_plan": "autopar.verify",
}

__version__ = "0.1.0"

__all__ = [
    "AutoparError",
    "Cluster",
    "NoFeasiblePlan",
    "ParallelModel",
    "ParallelPlan",
    "Precision",
    "Remat",
    "ScheduleKind",
    "SearchOptions",
    "Solver",
    "capture_graph",
    "make_plan",
    "parallelize",
    "plan_model",
    "simulate",
    "verify_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
