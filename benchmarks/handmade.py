"""Is the search ever worse than a plan that a person would write?

    python -m benchmarks.handmade --cases 50 --jobs 8 --write

Hand-made plans are all uniform grids of data x tensor x pipeline parallelism: blocks split equally
over the stages, one mesh (data, tensor) for all, tensor parallelism inside a node, 1F1B, powers of
two of microbatches, nothing or everything recomputed. Each is an integer program with fewer choices
on the data axis:

    batch, received        sharded by rows
    operators              those that touch rows take the rows
    parameters, gradients  as the ZeRO level says: 0 whole, 1 whole in the step and sharded at rest,
                           2 gradients sharded too, 3 sharded in the step; "any" of these for each
    tensor axis            free: Megatron's columns and rows are among its choices

so that its optimum is at least as good as what a person would write. Same cost model, budget,
solver and simulation as the search, of which nothing else is used. A point is left out where the
work that one of its stages has at least is already slower than the best hand-made plan, and one
that recomputes where the same without fits.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autopar.api import ModelWorkload, microbatch_counts
from autopar.candidate import simulate_stages
from autopar.errors import NoFeasiblePlan
from autopar.graph.family import GraphFamily
from autopar.graph.precision import Precision
from autopar.graph.program import OutputKind, Ref
from autopar.graph.repeat import Folded
from autopar.graph.work import is_contraction, operator_flops
from autopar.intraop.stage import SolverOptions, StageSolution
from autopar.intraop.stage_problem import Choice, Node, ParameterChoice
from autopar.layout import REPLICATE, first_atom
from autopar.lowering.lower import PreparedStage
from autopar.mesh import LogicalMesh, Submesh
from autopar.options import SearchOptions
from autopar.plan import Remat
from autopar.planner import find_plan
from autopar.schedule import ScheduleKind
from autopar.sharding.strategy import Strategy
from benchmarks import jobs, published
from benchmarks.forced import Forced, header_text, table_text
from benchmarks.models import gpt, llama, moe
from benchmarks.planning import WORKLOADS
from cost_models import Cluster, DeviceKind

ANY = "any"
ZERO = ("0", "1", "2", "3")
SEED = 20261122


@dataclass(frozen=True, slots=True)
class Grid:
    """A hand-made plan. zero: one of ZERO, or ANY of them for each parameter."""

    data: int
    tensor: int
    pipeline: int
    microbatches: int
    remat: Remat
    zero: str = ANY

    def __str__(self) -> str:
        sizes = f"dp {self.data}, tp {self.tensor}, pp {self.pipeline}"
        return f"{sizes}, B {self.microbatches}, remat {self.remat}, ZeRO {self.zero}"


@dataclass(frozen=True, slots=True)
class Case:
    """model: text of what `model_of` builds. budget: share of a device's memory."""

    name: str
    model: str
    cluster: str
    rows: int
    precision: str = "bf16"
    budget: float = 0.9


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds; inf where nothing fits."""

    case: Case
    ours_s: float
    ours: str
    best_s: float
    best: str
    points: int
    solves: int
    plan_s: float
    grid_s: float

    @property
    def ratio(self) -> float:
        """Ours over the best hand-made one: below 1 where the search wins."""
        if self.best_s == float("inf"):
            return 0.0 if self.ours_s < float("inf") else 1.0
        return self.ours_s / self.best_s


# ---- restriction


def on_data_axis(zero: str) -> Any:
    """The Restriction of axis 0 of a mesh whose axis 0 is data parallel."""

    def restriction(stage: PreparedStage, view: LogicalMesh) -> Any:
        rows = row_factors(stage)
        dims = stage.table.dims

        def keep(node: Node, choice: Choice) -> bool:
            if isinstance(choice, ParameterChoice):
                picks = [c for c in node.choices if isinstance(c, ParameterChoice)]
                able = any(c.rest[0] >= 0 for c in picks)
                if zero == ANY or not able:
                    return True
                if all(c.rest == c.step for c in picks):  # a second use: only how it is in the step
                    return (choice.step[0] >= 0) == (zero == "3")
                return (choice.rest[0] >= 0, choice.step[0] >= 0) == (zero != "0", zero == "3")
            if isinstance(choice, Strategy):
                found = [s for s in node.choices if isinstance(s, Strategy) and takes(node, s)]
                return not found or takes(node, choice)
            if node.kind == "output":
                sharded = choice[0] >= 0
                able = any(c[0] >= 0 for c in node.choices)  # type: ignore[index]
                if node.name not in gradients or zero == ANY:
                    return True
                return not sharded if zero in "01" else sharded or not able
            inp = inputs.get(node.name)
            if inp is None or not inp.meta.shape:
                return True
            atom = first_atom(dims[inp.ref], 0)
            by_rows = [c for c in node.choices if c[0] == atom]  # type: ignore[index]
            if inp.kind == "batch" or by_rows:
                return choice[0] == atom
            return True

        def takes(node: Node, strategy: Strategy) -> bool:
            factor = strategy.factors[0]
            return factor is not None and factor.name in rows.get(node.name, ())

        gradients = {out.target for out in stage.graph.outputs_of(OutputKind.GRADIENT)}
        inputs = {i.name: i for i in stage.graph.inputs if i.kind in ("batch", "received")}
        return keep

    return restriction


def row_factors(stage: PreparedStage) -> dict[str, set[str]]:
    """Of each operator the factors that are the rows of the batch, as far as inputs tell."""
    table = stage.table
    rows: dict[Ref, set[int]] = {}
    for inp in stage.graph.inputs:
        if inp.kind in ("batch", "received") and inp.meta.shape:
            atom = first_atom(table.dims[inp.ref], 0)
            rows[inp.ref] = set() if atom is None else {atom}
    found: dict[str, set[str]] = {}
    for op in stage.graph.operators:
        for factor in table.rules[op.name].factors:
            pairs = zip(op.operands, factor.operands, strict=False)
            if any(atom in rows.get(ref, ()) for ref, atom in pairs):
                found.setdefault(op.name, set()).add(factor.name)
                for index, atom in enumerate(factor.results):
                    if atom > REPLICATE:
                        rows.setdefault(Ref(op.name, index), set()).add(atom)
    return found


# ---- the grid


def grids(cluster: Cluster, num_blocks: int, counts: tuple[int, ...], rows: int) -> Iterator[Grid]:
    """Points of the grid, the ones with few stages first."""
    (group,) = cluster.groups
    devices, node = group.num_devices, group.devices_per_node
    for pipeline in _powers(min(num_blocks, devices)):
        if devices % pipeline or (devices // pipeline > node and devices // pipeline % node):
            continue
        for tensor in _powers(min(node, devices // pipeline)):
            data = devices // pipeline // tensor
            least = 1 if pipeline == 1 else pipeline
            for count in (c for c in counts if least <= c <= 16 * pipeline and c & (c - 1) == 0):
                if rows // count % data == 0:
                    yield Grid(data, tensor, pipeline, count, Remat.NONE)


def _powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


def equal_split(layer_names: tuple[str, ...], stages: int) -> tuple[int, ...]:
    """First layers: blocks divided as equally as they go; what precedes and follows them stays with
    the first and the last."""
    blocks = [i for i, name in enumerate(layer_names) if name not in ("first", "last")]
    return (0, *(blocks[len(blocks) * s // stages] for s in range(1, stages)))


def evaluate(forced: Forced, grid: Grid, stop_above: float) -> float | None:
    """Simulated seconds; None where it does not fit, or is slower than `stop_above` for sure."""
    names = layer_names(forced.program(grid.microbatches).folded)
    first_layers = equal_split(names, grid.pipeline)
    told = forced.cut(grid.microbatches, first_layers, (grid.remat,) * len(names))
    (group,) = forced.cluster.groups
    devices, node = grid.data * grid.tensor, group.devices_per_node
    submesh = Submesh(1, devices) if devices <= node else Submesh(devices // node, node)
    view = submesh.view(tuple(n for n in (grid.data, grid.tensor) if n > 1) or (1,))
    restriction = on_data_axis(grid.zero) if grid.data > 1 else None
    name = grid.zero if restriction else ""
    stages: list[StageSolution] = []
    earlier_s = 0.0
    for index in range(grid.pipeline):
        flight = min(grid.microbatches, grid.pipeline - index)
        solution = forced.solve(told, index, view, grid.microbatches, flight, restriction, name)
        if solution is None:
            return None
        stages.append(solution)
        seconds = solution.prediction.forward_s + solution.prediction.backward_s
        if earlier_s + grid.microbatches * seconds > stop_above:
            return None
        earlier_s += seconds
    schedule = ScheduleKind.ONE_F_ONE_B
    return simulate_stages(told.graphs, stages, schedule, grid.microbatches).step_s


def least_s(work_s: Sequence[float], names: Sequence[str], grid: Grid) -> float:
    """What the contractions take at least. work_s: of each layer and microbatch on one device."""
    bounds = [*equal_split(names, grid.pipeline), len(names)]
    stages = [
        sum(work_s[start:stop]) / (grid.data * grid.tensor)
        for start, stop in itertools.pairwise(bounds)
    ]
    before = itertools.accumulate(stages, initial=0.0)
    pairs = zip(stages, before, strict=False)
    return max(grid.microbatches * seconds + earlier for seconds, earlier in pairs)


def layer_work_s(folded: Folded, device: DeviceKind) -> list[float]:
    """Of each layer of the model: FLOP of its contractions at the plateau of one device."""
    graph, metas = folded.graph, folded.graph.metas()
    work = [0.0] * len(graph.layer_names)
    for op in graph.operators:
        meta = op.results[0]
        if is_contraction(op) and meta is not None:
            rate = device.peak_flops[str(meta.dtype).removeprefix("torch.")]
            work[op.layer] += operator_flops(op, metas) / (rate * device.matmul_efficiency)
    return [w for w, times in zip(work, folded.copies, strict=True) for _ in range(times)]


def best_handmade(
    forced: Forced,
    counts: tuple[int, ...],
    rows: int,
    zeros: tuple[str, ...] = (ANY,),
    below_s: float = float("inf"),
) -> tuple[float, Grid | None, int]:
    """Seconds, the plan, and how many points were solved; inf where none is below `below_s`. Points
    are taken by what they take at least, until that is more than the best."""
    names = layer_names(forced.program(counts[0]).folded)
    num_blocks = sum(name not in ("first", "last") for name in names)
    (group,) = forced.cluster.groups
    points = []
    for grid in grids(forced.cluster, num_blocks, counts, rows):
        folded = forced.program(grid.microbatches).folded
        points.append((least_s(layer_work_s(folded, group.device), names, grid), grid))
    points.sort(key=lambda point: point[0])
    best, found, solved = below_s, None, 0
    for (least, grid), zero in itertools.product(points, zeros):
        for remat in (Remat.NONE, Remat.FULL):
            if least >= best:
                break
            solved += 1
            point = replace(grid, remat=remat, zero=zero)
            seconds = evaluate(forced, point, best)
            if seconds is not None and seconds < best:
                best, found = seconds, point
            if seconds is not None:
                break  # to recompute is slower
    return best if found else float("inf"), found, solved


def layer_names(folded: Folded) -> tuple[str, ...]:
    """Of every layer of the model."""
    pairs = zip(folded.graph.layer_names, folded.copies, strict=True)
    return tuple(name for name, times in pairs for _ in range(times))


# ---- cases


def model_of(text: str, rows: int) -> tuple[nn.Module, Any]:
    """One of `benchmarks.published`, which has its own rows, or "gpt:hidden:layers:heads:length"
    and the like, on meta."""
    kind, *sizes = text.split(":")
    with torch.device("meta"):
        if not sizes:
            return getattr(published, text)()
        hidden, layers, heads, length = (int(size) for size in sizes[:4])
        if kind == "gpt":
            config = gpt.GPTConfig(hidden, layers, heads, seq_len=length)
            return gpt.GPT(config), gpt.example_batch(config, rows, "meta")
        if kind == "llama":
            wide = llama.LlamaConfig(
                hidden, hidden * 7 // 2, layers, heads, heads // 4, 32000, length
            )
            return llama.Llama(wide), llama.example_batch(wide, rows, "meta")
        experts = moe.MoEConfig(hidden, layers, heads, int(sizes[4]), 4 * hidden, seq_len=length)
        return moe.MoE(experts), moe.example_batch(experts, rows, "meta")


FIXED = tuple(
    Case(work.name, work.factory, work.cluster, rows, work.precision)
    for work, rows in zip(WORKLOADS, (16, 64, 64, 1024, 256, 2048, 16384), strict=True)
)
"""The workloads whose planning is timed. rows: of their batches."""


_SIZES = {
    "gpt": ((768, 12, 12), (1024, 24, 16), (2048, 24, 32), (4096, 32, 32), (8192, 48, 64)),
    "llama": ((2048, 16, 32), (4096, 32, 32), (8192, 48, 64)),
    "moe": ((768, 8, 16), (1024, 8, 16), (2048, 8, 16)),
}


def random_case(number: int) -> Case:
    """Realistic sizes, 0.1 to 40 B parameters, on 2 to 64 devices whose memory holds twice what
    stands of the model when it is sharded over all of them."""
    rng = random.Random(SEED + number)
    while True:
        kind = rng.choice(("gpt", "gpt", "llama", "moe"))
        hidden, layers, heads = rng.choice(_SIZES[kind])
        device, precision = rng.choice((("h100", "bf16"), ("a100", "bf16"), ("v100", "model")))
        nodes = rng.choice((1, 1, 1, 2, 8))
        per_node = rng.choice((2, 4, 8)) if nodes == 1 else 8
        experts = rng.choice((8, 16, 64))
        rows = nodes * per_node * rng.choice((1, 2, 4))
        budget = rng.choice((0.9, 0.9, 0.6, 0.3))
        cluster = Cluster.parse(f"{device}:{nodes}x{per_node}")
        parameters = layers * hidden**2 * (12 if kind != "moe" else 8 + 4 * experts)
        room = budget * cluster.num_devices * cluster.groups[0].device.memory_bytes
        if 2 * 16 * parameters < room:
            break
    text = f"{kind}:{hidden}:{layers}:{heads}:{rng.choice((512, 1024, 2048))}"
    text += f":{experts}" if kind == "moe" else ""
    return Case(f"random-{number}", text, str(cluster), rows, precision, budget)


def compare(case: Case, *, zeros: tuple[str, ...] = (ANY,), only_faster: bool = False) -> Result:
    """only_faster: points of the grid that are not faster than ours count as not fitting."""
    cluster = Cluster.parse(case.cluster)
    model, batch = model_of(case.model, case.rows)
    options = SearchOptions(cache=False)
    counts = microbatch_counts(batch, options)
    family = GraphFamily(model, batch, None, Precision.parse(case.precision))
    workload = ModelWorkload(family, counts)
    budget = case.budget * min(group.device.memory_bytes for group in cluster.groups)
    started = time.monotonic()
    ours_s, ours = float("inf"), "nothing fits"
    try:
        plan = find_plan(workload, cluster, budget_bytes=budget, options=options)
        ours_s = plan.step_s
        meshes = ", ".join("x".join(map(str, stage.axis_sizes)) for stage in plan.stages)
        layers = [stage.last_layer - stage.first_layer + 1 for stage in plan.stages]
        recomputed = sum(remat is not Remat.NONE for remat in plan.remat)
        ours = f"B {plan.num_microbatches}, layers {layers}, meshes {meshes}"
        ours += f", {recomputed} layers recomputed" if recomputed else ""
    except NoFeasiblePlan:
        pass
    planned = time.monotonic()
    solver = SolverOptions(fallback=False)  # as in the search
    forced = Forced(workload, cluster, budget, folded=True, solver=solver)
    below_s = ours_s if only_faster else float("inf")
    best_s, grid, points = best_handmade(forced, counts, case.rows, zeros, below_s)
    return Result(
        case,
        ours_s,
        ours,
        best_s,
        str(grid) if grid else "none is faster" if only_faster else "nothing fits",
        points,
        forced.num_solves,
        planned - started,
        time.monotonic() - planned,
    )


def row(result: Result) -> tuple[str, ...]:
    case = result.case
    where = f"{case.cluster}, {case.rows} rows, {case.budget:g} of memory, {case.precision}"
    return (
        case.name,
        case.model,
        where,
        f"{result.best_s * 1e3:.2f}",
        result.best,
        f"{result.ours_s * 1e3:.2f}",
        result.ours,
        f"{result.ratio:.4f}" if result.best_s < float("inf") else "",
        f"{result.plan_s:.1f}",
    )


HEADER = ("case", "model", "on", "best hand-made, ms", "which", "ours, ms", "which", "ratio", "s")


def line(result: Result) -> str:
    work = f"{result.points} points, {result.solves} solves, {result.grid_s:.1f} s"
    return " | ".join((*row(result), work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=50, help="random ones, beside the fixed ones")
    parser.add_argument("--first", type=int, default=0, help="number of the first random one")
    parser.add_argument("--devices", type=int, default=64, help="of random cases, at most")
    parser.add_argument("--fixed", default="all", help="names of fixed ones, or none")
    parser.add_argument("--levels", action="store_true", help="ZeRO levels one by one")
    parser.add_argument(
        "--only-faster",
        action="store_true",
        help="of the grid only what is faster than ours: quick on large clusters, without a ratio",
    )
    jobs.add_arguments(parser, minutes=600.0, limit_s=3600.0)
    args = parser.parse_args()
    cases = [c for c in FIXED if args.fixed == "all" or c.name in args.fixed.split(",")]
    drawn = (random_case(number) for number in itertools.count(args.first))
    small = (c for c in drawn if Cluster.parse(c.cluster).num_devices <= args.devices)
    cases += itertools.islice(small, args.cases)
    jobs.import_all()
    zeros = (ANY, *ZERO) if args.levels else (ANY,)
    done = jobs.compared(
        partial(compare, zeros=zeros, only_faster=args.only_faster), cases, args, line
    )
    ratios = sorted(r.ratio for r in done.results if 0 < r.ratio < float("inf"))
    worse = sum(r > 1 + 1e-6 for r in ratios)
    facts = {
        **jobs.where(),
        "cases": f"{len(done.results)} of the {len(cases)} asked for",
        **({"without a result": "; ".join(done.failures)} if done.failures else {}),
        "ratio ours / hand-made": f"least {ratios[0]:.4f}, median {ratios[len(ratios) // 2]:.4f},"
        f" most {ratios[-1]:.4f}; {worse} slower than hand-made"
        if ratios
        else "none",
    }
    text = header_text("Hand-made plans", jobs.command("handmade"), facts)
    text += "\n" + table_text(HEADER, [row(r) for r in done.results]) + "\n"
    print(text)
    if args.write:
        jobs.write("handmade-20261122", text, facts, done.results)


if __name__ == "__main__":
    main()
