"""The search against every plan there is, on random small graphs.

    python -m benchmarks.exhaustive --graphs 300 --jobs 8 --write

Every number of microbatches, every cut into stages, every assignment of submeshes that uses all
devices, every view of each, every policy of recomputation (one per stage), every schedule: every
stage is solved as a whole integer program, with no layer folded, and every combination is
simulated. Stages are solved for the microbatches in flight of 1F1B and of ZB-H1; interleaved ones,
which share a device's memory, without a budget. A plan counts where its simulated bytes fit.
Combinations are left out only where

    max over workers of  B (sum of t_s over its stages s) + sum of f_r over stages before its first

with t forward and backward of a microbatch and f forward, which any schedule takes at least, is
above the best; a stage's choices of which it is proved, before they are solved, that
B (t_s and its share of what comes once per step) is; and those that another one beats in all
seconds and bytes. Cuts come in the order of such bounds.

Stages are solved by the solver of the search without its fallback: exactly where memory is free.
Where memory binds it may leave a gap, so that there the result is a comparison and no proof. The
search mixes policies inside a stage, which the enumeration does not, and asks HiGHS about its
winner: its plans can be better. Of the search only the stage solver and the simulation are used.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.api import ModelWorkload
from autopar.candidate import allowed_views, simulate_stages
from autopar.errors import NoFeasiblePlan
from autopar.graph.family import GraphFamily
from autopar.graph.program import Graph
from autopar.intraop.stage import SolverOptions, StageSolution
from autopar.mesh import LogicalMesh, Submesh
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import find_plan
from autopar.schedule import ScheduleKind, in_flight_count
from benchmarks import jobs
from benchmarks.forced import Forced, ToldStages, header_text, table_text
from cost_models import Cluster, device, link

SEED = 20261122
EQUAL = 1e-6
HEADER = ("graph", "what", "ratio", "ours", "best of all")
_ROUNDING = 1 + 1e-6  # of bytes


class MlpBlock(nn.Module):
    """x + down(relu(up(x)))."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class AttentionBlock(nn.Module):
    """x + proj(attention(qkv(norm(x)))), on [rows, length, d]."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Blocks with an embedding and a head, or between tensors."""

    def __init__(self, blocks: Sequence[nn.Module], d: int, vocabulary: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.vocabulary = vocabulary
        if vocabulary:
            self.embedding = nn.Embedding(vocabulary, d)
            self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x
        if self.vocabulary:
            x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        if not self.vocabulary:
            return x.square().mean()
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


@dataclass(frozen=True, slots=True)
class Instance:
    """budget: share of the peak of the plan without a budget; None for no budget that binds."""

    model: nn.Module
    batch: Tensor
    cluster: Cluster
    counts: tuple[int, ...]
    budget: float | None
    text: str


def random_instance(number: int) -> Instance:
    """2 to 4 blocks (8 devices: 2), 1 or 2 nodes, links 0.1 to 10 times as fast as usual."""
    rng = random.Random(SEED + number)
    d = rng.choice((128, 256, 512, 1024))
    length, rows = rng.choice((16, 64, 256)), rng.choice((4, 8))
    depth, vocabulary = rng.choice((2, 2, 3, 4)), rng.choice((0, 0, 1024, 16384))
    nodes, per_node = rng.choice(((1, 2), (1, 4), (1, 4), (2, 1), (2, 2), (1, 8)))
    if per_node == 8:
        depth, vocabulary = 2, 0  # the number of plans grows with both
    uniform, kinds = rng.random() < 0.5, rng.choice(("mlp", "attention", "both"))
    widths = [d * rng.choice((1, 2, 4, 8)) for _ in range(depth)]
    picks = [rng.choice(("mlp", "attention")) if kinds == "both" else kinds for _ in range(depth)]
    if uniform:
        widths, picks = widths[:1] * depth, picks[:1] * depth
    with torch.device("meta"):
        blocks = [
            MlpBlock(d, width) if pick == "mlp" else AttentionBlock(d, 4)
            for pick, width in zip(picks, widths, strict=True)
        ]
        model = Model(blocks, d, vocabulary)
        shape = (rows, length)
        tokens = torch.zeros(shape, dtype=torch.long)
        batch = tokens if vocabulary else torch.empty(*shape, d)
    kind = rng.choice(("h100", "a100", "v100"))
    launch_s = rng.choice((1e-7, 1e-6, 5e-6))
    intra, inter = (
        replace(
            link(name),
            name=f"{name}-scaled",
            bandwidth_bytes_per_s=link(name).bandwidth_bytes_per_s * 10 ** rng.uniform(-1, 1),
            launch_s=rng.choice((1e-6, 45e-6)),
        )
        for name in ("nvlink4", "eth-25g")
    )
    cluster = Cluster.uniform(
        num_nodes=nodes,
        devices_per_node=per_node,
        device=replace(device(kind), launch_s=launch_s),
        intra=intra,
        inter=inter,
    )
    counts = tuple(sorted(rng.sample([n for n in (1, 2, 4, 8) if rows % n == 0], 2)))
    budget = rng.choice((None, None, rng.uniform(0.4, 0.95)))
    names = "+".join(
        f"{pick}{width if pick == 'mlp' else ''}" for pick, width in zip(picks, widths, strict=True)
    )
    text = f"{names}, d {d}, {rows}x{length}" + (f", vocabulary {vocabulary}" if vocabulary else "")
    return Instance(model.train(), batch, cluster, counts, budget, text)


# ---- the enumeration


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """A solved stage: on one view, under one policy."""

    graph: Graph
    solution: StageSolution
    policy: Remat

    @property
    def seconds(self) -> float:
        return self.solution.prediction.forward_s + self.solution.prediction.backward_s


@dataclass(frozen=True, slots=True)
class Shape:
    """Stages before anything is solved. num_workers: devices' groups, fewer than stages where they
    take turns."""

    count: int
    bounds: tuple[int, ...]  # first layers, and the number of layers
    submeshes: tuple[Submesh, ...]
    num_workers: int

    @property
    def num_stages(self) -> int:
        return len(self.submeshes)

    @property
    def takes_turns(self) -> bool:
        return self.num_workers < self.num_stages

    @property
    def schedules(self) -> tuple[ScheduleKind, ...]:
        if self.takes_turns:
            return (ScheduleKind.INTERLEAVED,)
        if self.num_stages == 1:
            return (ScheduleKind.ONE_F_ONE_B,)
        return (ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZB_H1)


@dataclass(frozen=True, slots=True)
class Found:
    step_s: float
    text: str
    simulated: int
    solves: int


def enumerate_all(
    workload: ModelWorkload, cluster: Cluster, budget_bytes: float, counts: Sequence[int]
) -> Found:
    """The least simulated step of all plans; inf where none fits."""
    solver = SolverOptions(target_gap=1e-3, fallback=False)
    forced = Forced(workload, cluster, budget_bytes, folded=False, solver=solver)
    num_layers = forced.program(counts[0]).num_layers
    submeshes, views = allowed_views(cluster, SearchOptions(), num_layers)
    found = Found(math.inf, "nothing fits", 0, 0)
    simulated = 0
    shapes = [
        (_shape_s(forced, shape, views), shape)
        for shape in _shapes(submeshes, cluster.num_devices, num_layers, counts)
    ]
    for least_s, shape in sorted(shapes, key=lambda pair: (pair[1].takes_turns, pair[0])):
        if least_s >= found.step_s:
            continue
        options = [
            _options(forced, shape, index, views[submesh], found.step_s)
            for index, submesh in enumerate(shape.submeshes)
        ]
        for stages in itertools.product(*options):
            for schedule in shape.schedules:
                if _least_s(stages, shape) >= found.step_s:
                    continue
                simulated += 1
                step_s = _step_s(stages, shape, schedule, budget_bytes)
                if step_s < found.step_s:
                    found = Found(step_s, _text(shape, stages, schedule), 0, 0)
    return replace(found, simulated=simulated, solves=forced.num_solves)


def _shapes(
    submeshes: Sequence[Submesh], devices: int, num_layers: int, counts: Sequence[int]
) -> Iterator[Shape]:
    """Those with stages on devices of their own, then those of equal submeshes in turns."""
    for count, workers in itertools.product(counts, range(1, min(num_layers, devices) + 1)):
        for packing in itertools.product(submeshes, repeat=workers):
            if sum(submesh.num_devices for submesh in packing) != devices:
                continue
            turns = len(set(packing)) == 1 and workers > 1 and count % workers == 0
            for times in range(1, num_layers // workers + 1 if turns else 2):
                for inner in itertools.combinations(range(1, num_layers), workers * times - 1):
                    yield Shape(count, (0, *inner, num_layers), packing * times, workers)


class Choice(NamedTuple):
    """A stage before it is solved; told has it at `position`. least_s: of a step with it."""

    told: ToldStages
    position: int
    view: LogicalMesh
    policy: Remat
    flight: int
    least_s: float


def _choices(
    forced: Forced, shape: Shape, index: int, views: Sequence[LogicalMesh]
) -> tuple[Choice, ...]:
    """Of one stage."""
    first, stop, num_layers = shape.bounds[index], shape.bounds[index + 1], shape.bounds[-1]
    cuts = tuple(sorted({0, first, stop} - {num_layers}))
    policies = (Remat.NONE, Remat.SELECTIVE, Remat.FULL)
    found = []
    for policy in policies[:1] if shape.takes_turns else policies:
        told = forced.cut(
            shape.count,
            cuts,
            tuple(policy if first <= layer < stop else Remat.NONE for layer in range(num_layers)),
        )
        position = cuts.index(first)
        for view, flight in itertools.product(views, _flights(shape, index)):
            least_s = 0.0
            if not shape.takes_turns:
                least_s = shape.count * forced.least_seconds(
                    told, position, view, shape.count, flight
                )
            found.append(Choice(told, position, view, policy, flight, least_s))
    return tuple(found)


def _flights(shape: Shape, index: int) -> tuple[int, ...]:
    """Microbatches that a stage holds under the schedules, each number once."""
    flights = {
        in_flight_count(
            kind,
            shape.num_stages - index,
            shape.count,
            num_stages=shape.num_stages,
            num_workers=shape.num_workers,
        )
        for kind in shape.schedules
    }
    return tuple(sorted(flights))


def _shape_s(forced: Forced, shape: Shape, views: Mapping[Submesh, Sequence[LogicalMesh]]) -> float:
    """What a step takes at least."""
    return max(
        min(choice.least_s for choice in _choices(forced, shape, index, views[submesh]))
        for index, submesh in enumerate(shape.submeshes)
    )


def _options(
    forced: Forced, shape: Shape, index: int, views: Sequence[LogicalMesh], below_s: float
) -> tuple[Option, ...]:
    """Of one stage, those that may be in a step of less than below_s and that no other beats in
    everything. below_s: never more than before."""
    first, stop = shape.bounds[index], shape.bounds[index + 1]
    flights = _flights(shape, index)
    key = ("options", shape.count, first, stop, flights, shape.takes_turns, tuple(views))
    known = forced.remembered.get(key)
    if known is not None:
        return known  # type: ignore[no-any-return]
    options = []
    for told, position, view, policy, flight, least_s in _choices(forced, shape, index, views):
        if least_s >= below_s:
            continue
        within = not shape.takes_turns
        solution = forced.solve(told, position, view, shape.count, flight, within_budget=within)
        if solution is not None:
            options.append(Option(told.graphs[position], solution, policy))
    kept: list[Option] = []
    for option in sorted(options, key=_costs):
        if not any(_beats(other, option) for other in kept):
            kept.append(option)
    forced.remembered[key] = tuple(kept)
    return tuple(kept)


def _costs(option: Option) -> tuple[float, ...]:
    """Seconds and bytes, less of each is never worse."""
    p = option.solution.prediction
    seconds = (p.forward_s, p.backward_s, p.backward_s - p.weight_s, p.gather_s, p.reduce_s)
    nbytes = (p.parameter_bytes + p.gradient_bytes + p.optimizer_bytes, p.transient_bytes)
    return (
        *seconds,
        p.step_s - p.gather_s - p.reduce_s,
        *option.solution.receive_s.values(),
        *nbytes,
        p.saved_bytes,
        p.weight_bytes,
    )


def _beats(one: Option, two: Option) -> bool:
    return all(a <= b for a, b in zip(_costs(one), _costs(two), strict=True))


def _least_s(stages: Sequence[Option], shape: Shape) -> float:
    before, least = 0.0, 0.0
    for worker in range(shape.num_workers):
        own = stages[worker :: shape.num_workers]
        least = max(least, before + shape.count * sum(stage.seconds for stage in own))
        before += stages[worker].solution.prediction.forward_s
    return least


def _step_s(
    stages: Sequence[Option], shape: Shape, schedule: ScheduleKind, budget_bytes: float
) -> float:
    """Simulated; inf where it does not fit."""
    timeline = simulate_stages(
        [stage.graph for stage in stages],
        [stage.solution for stage in stages],
        schedule,
        shape.count,
        num_workers=shape.num_workers,
    )
    fits = max(timeline.worker_peak_bytes) <= budget_bytes * _ROUNDING
    return timeline.step_s if fits else math.inf


def _text(shape: Shape, stages: Sequence[Option], schedule: ScheduleKind) -> str:
    parts = [
        f"{stop - first} on {option.solution.mesh}"
        + ("" if option.policy is Remat.NONE else f" {option.policy}")
        for (first, stop), option in zip(itertools.pairwise(shape.bounds), stages, strict=True)
    ]
    return f"B {shape.count} {schedule}: {', '.join(parts)}"


# ---- the comparison


@dataclass(frozen=True, slots=True)
class Compared:
    """tight: memory binds. Seconds; inf where nothing fits."""

    number: int
    text: str
    tight: bool
    ours_s: float
    ours: str
    best_s: float
    best: str
    simulated: int
    solves: int
    plan_s: float
    all_s: float

    @property
    def ratio(self) -> float:
        if math.isinf(self.best_s):
            return 1.0 if math.isinf(self.ours_s) else 0.0
        return self.ours_s / self.best_s


def compare(number: int) -> Compared:
    instance = random_instance(number)
    workload = ModelWorkload(GraphFamily(instance.model, instance.batch), instance.counts)
    options = SearchOptions(cache=False, offload=False)
    started = time.monotonic()
    plan: ParallelPlan | None = find_plan(workload, instance.cluster, options=options)
    assert plan is not None
    budget = plan.budget_bytes
    if instance.budget is not None:
        budget = instance.budget * max(s.prediction.peak_bytes for s in plan.stages)
        started = time.monotonic()
        try:
            plan = find_plan(workload, instance.cluster, budget_bytes=budget, options=options)
        except NoFeasiblePlan:
            plan = None
    planned = time.monotonic()
    best = enumerate_all(workload, instance.cluster, budget, instance.counts)
    return Compared(
        number,
        f"{instance.text}; {instance.cluster}, inter {_rate(instance.cluster)}",
        instance.budget is not None,
        plan.step_s if plan else math.inf,
        _plan_text(plan) if plan else "nothing fits",
        best.step_s,
        best.text,
        best.simulated,
        best.solves,
        planned - started,
        time.monotonic() - planned,
    )


def _rate(cluster: Cluster) -> str:
    return f"{cluster.inter.bandwidth_bytes_per_s / 1e9:.2g} GB/s"


def _plan_text(plan: ParallelPlan) -> str:
    parts = []
    for stage in plan.stages:
        layers = range(stage.first_layer, stage.last_layer + 1)
        mesh = "x".join(map(str, stage.axis_sizes))
        policies = {str(plan.remat[layer]) for layer in layers} - {"none"}
        parts.append(" ".join([f"{len(layers)} on {mesh}", *sorted(policies)]))
    return f"B {plan.num_microbatches} {plan.schedule}: {', '.join(parts)}"


def summary(results: Sequence[Compared]) -> dict[str, Any]:
    """What a reader wants to know first."""
    found: dict[str, Any] = {}
    for name, tight in (("memory free", False), ("memory tight", True)):
        some = [r for r in results if r.tight is tight]
        both = [r for r in some if math.isfinite(r.ours_s) and math.isfinite(r.best_s)]
        ratios = sorted(r.ratio for r in both)
        if not ratios:
            continue
        neither = sum(math.isinf(r.ours_s) and math.isinf(r.best_s) for r in some)
        lost = sum(math.isinf(r.ours_s) and math.isfinite(r.best_s) for r in some)
        equal = sum(abs(r - 1) <= EQUAL for r in ratios)
        better = sum(r < 1 - EQUAL for r in ratios)
        quantiles = ", ".join(
            f"{q:.0%} {ratios[min(len(ratios) - 1, int(q * len(ratios)))]:.4f}" for q in (0.5, 0.9)
        )
        found[name] = (
            f"{len(some)} graphs, {neither} where neither found a plan, {lost} where only the"
            f" enumeration did; of the other {len(ratios)}, {equal} equal within 1e-6, {better}"
            f" better, {len(ratios) - equal - better} worse; ratio {quantiles}, most"
            f" {ratios[-1]:.4f}"
        )
    return found


def row(result: Compared) -> tuple[str, ...]:
    return (str(result.number), result.text, f"{result.ratio:.4f}", result.ours, result.best)


def line(result: Compared) -> str:
    return (
        f"{result.number} {result.ratio:.6f} {'tight' if result.tight else 'free'} ours"
        f" {result.ours} | best {result.best} | {result.text} | {result.plan_s:.1f} s,"
        f" {result.all_s:.1f} s {result.solves} solves {result.simulated} simulated"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    jobs.add_arguments(parser, minutes=600.0, limit_s=1800.0)
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.graphs)
    jobs.import_all()
    done = jobs.compared(compare, numbers, args, line)
    facts = {
        **jobs.where(),
        "graphs": f"{len(done.results)} of the {args.graphs} asked for",
        **({"without a result": "; ".join(done.failures)} if done.failures else {}),
        **summary(done.results),
    }
    worse = [r for r in done.results if r.ratio > 1 + EQUAL]
    rows = [row(r) for r in sorted(worse, key=lambda r: -r.ratio)]
    text = header_text("Every plan of small graphs", jobs.command("exhaustive"), facts)
    text += "\nWhere the search is worse:\n\n" if rows else "\nThe search is worse nowhere.\n"
    text += table_text(HEADER, rows) + "\n" if rows else ""
    print(text)
    if args.write:
        jobs.write("exhaustive-20261122", text, facts, done.results)


if __name__ == "__main__":
    main()
