"""The public door: one call plans, lowers and builds the parallel model.

    plan_model    model + batch + cluster -> plan        no GPU, no weights
    parallelize   ... -> ParallelModel                   under torchrun, or in one process

Under torchrun rank 0 plans and everyone gets its plan; with a plan given no search runs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.errors import NoFeasiblePlan, OptionError, PlanError
from autopar.graph.batch import batch_rows, microbatch_of
from autopar.graph.capture import LossFn, capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.precision import Precision
from autopar.graph.program import Graph
from autopar.options import SearchOptions, parse_bytes
from autopar.plan import ParallelPlan
from autopar.planner import make_plan
from autopar.runtime.launch import torchrun_world
from autopar.runtime.module import ParallelModel
from cost_models import Cluster

Progress = Callable[[str], None]

_MORE_MICROBATCHES = (4, 16, 64, 256)  # tried in turn where nothing fits
# What torch.cuda calls a device -> its name in the cost models' catalogue.
_DEVICE_NAMES = (
    (r"NVIDIA H200", "h200"),
    (r"NVIDIA H100 80GB HBM3", "h100"),
    (r"NVIDIA A100-SXM4-80GB", "a100"),
    (r"Tesla V100-SXM[23]-16GB", "v100"),
    (r"Tesla V100-SXM[23]-32GB", "v100-32gb"),
)


def plan_model(
    model: nn.Module,
    example_batch: Any,
    cluster: Cluster,
    *,
    loss_fn: LossFn | None = None,
    memory_budget: str | float | None = None,
    precision: Precision = Precision(),
    options: SearchOptions = SearchOptions(),
    progress: Progress = lambda _: None,
) -> tuple[ParallelPlan, Graph]:
    """The best plan, and the layered graph that it is for. example_batch: a global batch.

    memory_budget: bytes per device, or text such as "70GiB". NoFeasiblePlan where nothing fits.
    """
    budget = parse_bytes(memory_budget)
    best: tuple[ParallelPlan, Graph] | None = None
    failures: list[NoFeasiblePlan] = []
    counts = list(microbatch_counts(example_batch, cluster, options))
    more = [] if options.num_microbatches else _divisors(example_batch, _MORE_MICROBATCHES)
    while counts:
        count = counts.pop(0)
        progress(f"capture, {count} microbatch(es)")
        graph = captured_graph(model, example_batch, count, loss_fn, options, precision)
        try:
            plan = make_plan(
                graph,
                cluster,
                num_microbatches=count,
                budget_bytes=budget,
                options=options,
                progress=progress,
            )
        except NoFeasiblePlan as error:
            failures.append(error)
            if not counts and best is None:  # smaller microbatches need less memory
                counts = [n for n in more if n > count][:1]
            continue
        if best is None or plan.step_s < best[0].step_s:
            best = replace(plan, precision=str(precision)), graph
    if best is None:
        raise failures[-1]
    return best


def captured_graph(
    model: nn.Module,
    example_batch: Any,
    num_microbatches: int,
    loss_fn: LossFn | None = None,
    options: SearchOptions = SearchOptions(),
    precision: Precision = Precision(),
) -> Graph:
    """The layered graph of one microbatch of a global batch."""
    part = microbatch_of(example_batch, num_microbatches)
    return cluster_layers(capture_graph(model, part, loss_fn, precision), options.num_layers)


def microbatch_counts(
    example_batch: Any, cluster: Cluster, options: SearchOptions
) -> tuple[int, ...]:
    """The numbers of microbatches to try, each needs a capture: the pinned one; 2 S and 4 S for a
    pinned pipeline of S stages; 1 and 8 where several nodes make a pipeline likely; else 1. Rounded
    down to divisors of the rows. Where nothing fits, `plan_model` goes on to more."""
    if options.num_microbatches is not None:
        return (options.num_microbatches,)
    stages = options.num_stages or 1
    wanted = (1, 8) if cluster.num_nodes > 1 else (1,)
    return _divisors(example_batch, (2 * stages, 4 * stages) if stages > 1 else wanted)


def _divisors(example_batch: Any, wanted: Sequence[int]) -> tuple[int, ...]:
    """The largest divisors of the batch's rows that are at most the wanted numbers."""
    rows = batch_rows(example_batch) or 1
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return tuple(sorted({max(d for d in divisors if d <= w) for w in wanted}))


def detect_cluster(world_size: int = 1, local_size: int | None = None) -> Cluster:
    """The cluster of a job of world_size processes, local_size on each node: one GPU each, or the
    CPU. OptionError for a GPU that the cost models do not know: pass a Cluster then."""
    per_node = local_size or world_size
    kind = "cpu"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        found = [kind for pattern, kind in _DEVICE_NAMES if re.fullmatch(pattern, name)]
        if not found:
            raise OptionError(
                f"no cost model for the GPU {name!r}: pass cluster=Cluster.from_toml(...) with its "
                "data, or the text of a similar one, such as cluster='h100:1x8'"
            )
        kind = found[0]
    return Cluster.parse(f"{kind}:{world_size // per_node}x{per_node}")


def parallelize(
    model: nn.Module,
    example_batch: Any,
    *,
    loss_fn: LossFn | None = None,
    cluster: Cluster | str | None = None,
    memory_budget: str | float | None = None,
    precision: Precision = Precision(),
    plan: ParallelPlan | str | Path | None = None,
    options: SearchOptions = SearchOptions(),
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> ParallelModel:
    """The model running in parallel on the devices there are.

    model:         with the same weights on every rank, of which each keeps its shards only; or on
                   meta: every rank then initialises its own shards, a module at a time, by `seed`.
    example_batch: a global batch: `train_step` takes such batches.
    loss_fn:       loss_fn(outputs, batch) -> scalar; without one the model returns its loss.
    precision:     Precision.parse("bf16"): compute in bfloat16 with float32 parameters, gradients
                   and optimizer states; as the model is built by default.
    plan:          a plan or its file: no search runs. It must belong to this model and batch, and
                   brings its own precision.
    cluster:       what to plan for; by default what is there. Its devices must number the ranks.
    """
    world = torchrun_world()
    given = ParallelPlan.load(plan) if isinstance(plan, (str, Path)) else plan
    if given is None:
        with contextlib.nullcontext() if world is None else world.guard("planning"):
            if world is None or world.rank == 0:
                target = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
                if target is None and world is None:
                    target = detect_cluster()
                elif target is None and world is not None:
                    target = detect_cluster(world.size, world.local_size)
                assert target is not None
                given, _ = plan_model(
                    model,
                    example_batch,
                    target,
                    loss_fn=loss_fn,
                    memory_budget=memory_budget,
                    precision=precision,
                    options=options,
                    progress=progress,
                )
            if world is not None:
                given = world.broadcast_object(given)
    assert given is not None
    progress("capture")
    graph = graph_of_plan(model, example_batch, given, loss_fn)
    progress("lower")
    place = torch.device(device or _device())
    return ParallelModel(model, graph, given, world=world, device=place, seed=seed)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def graph_of_plan(
    model: nn.Module, example_batch: Any, plan: ParallelPlan, loss_fn: LossFn | None = None
) -> Graph:
    """The layered graph that a plan was made for. PlanError if model and batch give another one."""
    part = microbatch_of(example_batch, plan.num_microbatches)
    captured = capture_graph(model, part, loss_fn, Precision.parse(plan.precision))
    graph = captured
    for num_layers in (None, len(plan.layer_names)):
        graph = cluster_layers(captured, num_layers)
        if graph.fingerprint() == plan.graph and graph.layer_names == plan.layer_names:
            return graph
    raise PlanError(
        f"the plan (graph {plan.graph}) was made for another model, batch or version than this one "
        f"(graph {graph.fingerprint()}): make it again with `autopar plan`"
    )
