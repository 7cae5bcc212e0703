"""The public door: one call plans, lowers and builds the parallel model.

    plan_model    model + batch + cluster -> plan        no GPU, no weights
    parallelize   ... -> ParallelModel                   under torchrun, or in one process

Under torchrun rank 0 plans and everyone gets its plan; with a plan given no search runs.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autopar.errors import OptionError, PlanError, RuleWarning
from autopar.garbage import seldom_collected
from autopar.graph.batch import batch_rows, microbatch_of
from autopar.graph.capture import LossFn
from autopar.graph.family import GraphFamily
from autopar.graph.fold import capture_folded
from autopar.graph.layers import cluster_layers
from autopar.graph.precision import Precision
from autopar.graph.program import Graph
from autopar.graph.repeat import Folded, whole_graph
from autopar.options import SearchOptions, parse_bytes
from autopar.plan import ParallelPlan
from autopar.planner import find_plan
from cost_models import Cluster

if TYPE_CHECKING:
    from autopar.runtime.module import ParallelModel

Progress = Callable[[str], None]

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
    A RuleWarning for each operator that has no sharding rule of autopar's own.

    memory_budget: bytes per device, or text such as "70GiB". NoFeasiblePlan where nothing fits.
    """
    family = GraphFamily(model, example_batch, loss_fn, precision, options.num_layers)
    workload = ModelWorkload(family, microbatch_counts(example_batch, options))
    with seldom_collected(), contextlib.closing(family):
        family.expect_all(workload.counts)
        plan = find_plan(
            workload,
            cluster,
            budget_bytes=parse_bytes(memory_budget),
            options=options,
            progress=progress,
        )
        graph = whole_graph(workload.exact(plan.num_microbatches))
    for sentence in plan.unwritten_rules():
        warnings.warn(sentence, RuleWarning, stacklevel=2)
    return replace(plan, precision=str(precision)), graph


@dataclass(frozen=True, slots=True, eq=False)
class ModelWorkload:
    """A model as the search sees it: its graph at each number of microbatches."""

    family: GraphFamily
    counts: tuple[int, ...]

    def at(self, num_microbatches: int) -> Folded:
        return self.family.at(num_microbatches)

    def exact(self, num_microbatches: int) -> Folded:
        return self.family.exact(num_microbatches)

    def expect(self, num_microbatches: int) -> None:
        self.family.expect(num_microbatches)


def microbatch_counts(example_batch: Any, options: SearchOptions) -> tuple[int, ...]:
    """The numbers of microbatches that a search may choose from: the pinned one, or every divisor
    of the rows up to the limit."""
    if options.num_microbatches is not None:
        return (options.num_microbatches,)
    rows = batch_rows(example_batch) or 1
    most = min(rows, options.microbatch_limit or rows)
    return tuple(n for n in range(1, most + 1) if rows % n == 0)


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
    compiled: bool | None = None,
    cuda_graph: bool | None = None,
    peer_copies: bool | None = None,
    tune_products: bool | None = None,
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
    compiled:      whether the programs run as compiled code (Inductor; a minute or so at the first
                   step) or operator by operator; by default on GPUs.
    cuda_graph:    whether a compiled step of one stage and one microbatch is captured as a CUDA
                   graph, in its third step; by default where launching its kernels may take a busy
                   host longer than running them takes the GPU. Its memory stays reserved, beside
                   what evaluations take; the next step writes over gradients that are kept, but
                   for those in `.grad`: clone others.
    peer_copies:   whether gathers of parameters and reductions of gradients in such a step are
                   copies by the GPUs' copy engines, which take no multiprocessor from products:
                   by default where the GPUs of a group reach each other's memory. Not in a CUDA
                   graph of short kernels, where NCCL is faster.
    tune_products: whether each large product of matrices in compiled programs takes the kernel of
                   cuBLASLt's that is the fastest on this GPU, under its limit of power, or the one
                   that its heuristic puts first. Kernels are timed at the first step, up to two
                   seconds for each size of product, and kept in the cache; by default on GPUs of
                   compute capability 9.0, where that was measured.
    cluster:       what to plan for; by default what is there. Its devices must number the ranks.
    """
    from autopar.runtime.launch import torchrun_world  # planning alone needs no runtime
    from autopar.runtime.module import ParallelModel

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
                if options.compiled is None:
                    options = replace(options, compiled=compiled)
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
    return ParallelModel(
        model,
        graph,
        given,
        world=world,
        device=place,
        seed=seed,
        compiled=compiled,
        cuda_graph=cuda_graph,
        peer_copies=peer_copies,
        tune_products=tune_products,
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def graph_of_plan(
    model: nn.Module, example_batch: Any, plan: ParallelPlan, loss_fn: LossFn | None = None
) -> Graph:
    """The layered graph that a plan was made for. PlanError if model and batch give another one."""
    part = microbatch_of(example_batch, plan.num_microbatches)
    folded = capture_folded(model, part, loss_fn, Precision.parse(plan.precision))
    graph = whole_graph(folded)
    for num_layers in (None, len(plan.layer_names)):
        if num_layers is not None:
            graph = cluster_layers(graph, num_layers)
        if graph.fingerprint() == plan.graph and graph.layer_names == plan.layer_names:
            return graph
    raise PlanError(
        f"the plan (graph {plan.graph}) was made for another model, batch or version than this one "
        f"(graph {graph.fingerprint()}): make it again with `autopar plan`"
    )
