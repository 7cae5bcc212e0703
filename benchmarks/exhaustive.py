"""The search against every plan there is, on random small graphs.

    python -m benchmarks.exhaustive --graphs 300 --write

Every number of microbatches, every cut into stages, every assignment of submeshes that uses all
devices, every view of each, every policy of recomputation (one per stage): every stage is solved as
a whole integer program, with no layer folded, and every combination is simulated. Combinations are
left out only where

    max over stages s of  (B t_s + sum of t_r over earlier r)

with t forward and backward of a microbatch, which 1F1B takes at least, is above the best; and of a
stage's choices those that another one of the same stage beats in forward, backward, once-per-step
and receiving seconds.

Stages are solved by the solver of the search without its fallback: exactly where memory is free.
Where memory binds its gap can be large in stages so small (0.93 in graph 12), so that there the
result is a comparison and no proof. The search mixes policies inside a stage, which the enumeration
does not, and asks HiGHS about its winner: its plans can be better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.api import ModelWorkload
from autopar.candidate import allowed_views
from autopar.errors import NoFeasiblePlan
from autopar.graph.family import GraphFamily
from autopar.graph.program import Graph
from autopar.intraop.stage import SolverOptions, StageSolution
from autopar.mesh import LogicalMesh, Submesh
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import find_plan
from benchmarks import environment
from benchmarks.forced import Forced, header_text, table_text
from benchmarks.run import RESULTS
from cost_models import Cluster, device, link

SEED = 20261122
EQUAL = 1e-6


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
    for count in counts:
        for num_stages in range(1, min(num_layers, cluster.num_devices) + 1):
            packings = list(_packings(submeshes, cluster.num_devices, num_stages))
            for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
                bounds = (0, *inner, num_layers)
                for packing in packings:
                    options = [
                        _options(forced, count, bounds, index, views[submesh])
                        for index, submesh in enumerate(packing)
                    ]
                    for stages in itertools.product(*options):
                        if _least_s(stages, count) >= found.step_s:
                            continue
                        simulated += 1
                        step_s = forced.step_s(
                            tuple(o.graph for o in stages),
                            tuple(o.solution for o in stages),
                            count,
                        )
                        if step_s < found.step_s:
                            found = Found(step_s, _text(count, bounds, stages), 0, 0)
    return replace(found, simulated=simulated, solves=forced.num_solves)


def _packings(
    submeshes: Sequence[Submesh], devices: int, stages: int
) -> Iterator[tuple[Submesh, ...]]:
    for packing in itertools.product(submeshes, repeat=stages):
        if sum(submesh.num_devices for submesh in packing) == devices:
            yield packing


def _options(
    forced: Forced,
    count: int,
    bounds: Sequence[int],
    index: int,
    views: Sequence[LogicalMesh],
) -> tuple[Option, ...]:
    """Of one stage, those that no other beats in everything."""
    first, stop, num_layers = bounds[index], bounds[index + 1], bounds[-1]
    from_end = len(bounds) - 1 - index
    key = ("options", count, first, stop, min(from_end, count), tuple(views))
    known = forced.remembered.get(key)
    if known is not None:
        return known  # type: ignore[no-any-return]
    cuts = tuple(sorted({0, first, stop} - {num_layers}))
    options = []
    for policy in (Remat.NONE, Remat.SELECTIVE, Remat.FULL):
        policies = tuple(
            policy if first <= layer < stop else Remat.NONE for layer in range(num_layers)
        )
        told = forced.cut(count, cuts, policies)
        position = cuts.index(first)
        for view in views:
            solution = forced.solve(told, position, view, count, from_end)
            if solution is not None:
                options.append(Option(told.graphs[position], solution, policy))
    kept: list[Option] = []
    for option in sorted(options, key=_costs):
        if not any(_beats(other, option) for other in kept):
            kept.append(option)
    forced.remembered[key] = tuple(kept)
    return tuple(kept)


def _costs(option: Option) -> tuple[float, ...]:
    p = option.solution.prediction
    return (p.forward_s, p.backward_s, p.step_s, *option.solution.receive_s.values())


def _beats(one: Option, two: Option) -> bool:
    return all(a <= b for a, b in zip(_costs(one), _costs(two), strict=True))


def _least_s(stages: Sequence[Option], count: int) -> float:
    before, least = 0.0, 0.0
    for stage in stages:
        least = max(least, before + count * stage.seconds)
        before += stage.seconds
    return least


def _text(count: int, bounds: Sequence[int], stages: Sequence[Option]) -> str:
    parts = [
        f"{stop - first} on {option.solution.mesh}"
        + ("" if option.policy is Remat.NONE else f" {option.policy}")
        for (first, stop), option in zip(itertools.pairwise(bounds), stages, strict=True)
    ]
    return f"B {count}: {', '.join(parts)}"


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
    options = SearchOptions(cache=False)
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
    return f"B {plan.num_microbatches}: {', '.join(parts)}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="no graph starts after that")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, results = time.monotonic(), []
    for number in range(args.first, args.first + args.graphs):
        if time.monotonic() - started > 60 * args.minutes:
            break
        results.append(found := compare(number))
        print(
            f"{number} {found.ratio:.5f} {'tight' if found.tight else 'free'} ours {found.ours}"
            f" | best {found.best} | {found.text} | {found.plan_s:.1f} s, {found.all_s:.1f} s"
            f" {found.solves} solves {found.simulated} simulated",
            flush=True,
        )
    facts = {
        "commit": environment.commit(),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.versions().items()),
        "hardware": json.dumps(environment.hardware()),
        "graphs": f"{len(results)} of the {args.graphs} asked for, in the minutes given",
        **summary(results),
    }
    worst = sorted(results, key=lambda r: -r.ratio)
    rows = [
        (str(r.number), r.text, f"{r.ratio:.4f}", r.ours, r.best)
        for r in worst
        if r.ratio > 1 + EQUAL
    ]
    command = "python -m benchmarks.exhaustive " + " ".join(sys.argv[1:])
    text = header_text("Every plan of small graphs", command, facts)
    text += "\nWhere the search is worse:\n\n"
    text += table_text(("graph", "what", "ratio", "ours", "best of all"), rows) + "\n"
    print(text)
    if args.write:
        records = [asdict(r) | {"ratio": r.ratio} for r in results]
        path = RESULTS / "exhaustive-20261122.json"
        path.write_text(
            json.dumps({**facts, "results": records}, indent=1) + "\n", encoding="utf-8"
        )
        (RESULTS / "exhaustive-20261122.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
