"""Is a stage whose equal layers are folded as good as the same stage with every layer written?

    python -m benchmarks.folded --jobs 8 --write
    python -m benchmarks.folded --models gpt2-124m bert-large --meshes 4

One stage holds a whole model, at the published sizes of the zoo and of the benchmark models, on one
mesh of h100:1x4, without a budget and with one that binds. Three objectives, in seconds of a
microbatch:

    folded    two layers stand for all inner ones, which choose alike: what plans are made of, with
              folds split where a plan's are
    unfolded  one integer program with every layer written, which need not choose alike
    composed  the sum over layers, each solved alone: what stage cuts are searched with

Folded over unfolded is at least 1 where the unfolded program is solved, up to the gap. "Solved" is
a gap of at most 1 % within the limit; where it is not, folded over the bound of the unfolded
program still is a proof of how far from the optimum folding can be. Models without a run of layers
to fold are left out, and named.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autopar.api import ModelWorkload
from autopar.estimate import MeshCosts
from autopar.graph.family import GraphFamily
from autopar.graph.precision import Precision
from autopar.intraop.compose import layer_points, stage_seconds
from autopar.intraop.fold import NotFoldable
from autopar.intraop.stage import SolverOptions
from autopar.intraop.stage_problem import StageContext
from autopar.mesh import LogicalMesh, Submesh
from autopar.models import find_factory
from autopar.plan import Remat
from autopar.search.exact import MAX_SPLITS
from autopar.search.program import Program
from benchmarks import jobs
from benchmarks.forced import Forced, ToldStages, header_text, table_text
from cost_models import Cluster

CLUSTER, ROWS_IN, IN_FLIGHT = "h100:1x4", 2, 1  # the rows are cut into two microbatches
MESHES = ("4", "2x2")
TIGHT = (0.4, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the bytes of the fastest solution: the least that fits
SOLVED_GAP = 0.01
NO_GAP = 1e-4  # what solvers aim at
OWN = ("gpt-1.3b", "llama-8l", "moe-2.4b")  # of benchmarks.models


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    mesh: str
    limit_s: float

    def __str__(self) -> str:
        return f"{self.model} on {self.mesh}"


@dataclass(frozen=True, slots=True)
class Solve:
    """An objective and its bound, seconds per microbatch; and how long it took."""

    seconds: float
    bound: float
    took_s: float

    @property
    def gap(self) -> float:
        return self.seconds / self.bound - 1 if self.bound > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Pair:
    """One program both ways. budget_bytes: inf without one. unfolded: None where nothing was found
    within the limit. composed_s: inf where by the layers alone nothing fits."""

    policy: Remat
    budget_bytes: float
    folded: Solve
    unfolded: Solve | None
    composed_s: float

    @property
    def solved(self) -> bool:
        return self.unfolded is not None and self.unfolded.gap <= SOLVED_GAP

    @property
    def ratio(self) -> float:
        """Folded over unfolded."""
        return self.folded.seconds / self.unfolded.seconds if self.unfolded else math.nan

    @property
    def at_most(self) -> float:
        """Folded over what no solution of the unfolded program is below."""
        return self.folded.seconds / self.unfolded.bound if self.unfolded else math.inf


@dataclass(frozen=True, slots=True)
class Compared:
    """layers: of the model. folds: how many layers each fold stands for; without any nothing was
    compared. refused: why layers that look equal are not folded. pairs: free, and under a budget
    where some share of TIGHT binds and fits."""

    model: str
    mesh: str
    layers: int
    folds: tuple[int, ...]
    refused: str
    pairs: tuple[Pair, ...]

    @property
    def ratio(self) -> float:
        return max((p.ratio for p in self.pairs if p.solved), default=math.nan)


def compare(case: Case) -> Compared:
    with torch.device("meta"):
        model, batch = find_factory(case.model)[0]()
    family = GraphFamily(model, batch, None, Precision.parse("bf16"))
    cluster, workload = Cluster.parse(CLUSTER), ModelWorkload(family, (ROWS_IN,))
    sizes = tuple(int(n) for n in case.mesh.split("x"))
    view = Submesh(1, math.prod(sizes)).view(sizes)
    options = SolverOptions(time_limit_s=case.limit_s, target_gap=NO_GAP)
    folded, unfolded = (
        Forced(workload, cluster, math.inf, folded=fold, solver=options) for fold in (True, False)
    )
    program = folded.program(ROWS_IN)
    layers = program.num_layers
    told = _told(folded, Remat.NONE)
    assert told.window is not None
    folds = tuple(fold.count for fold in told.window.folds(0))
    if not folds:
        return Compared(case.model, case.mesh, layers, (), "", ())
    pairs: list[Pair] = []
    try:
        for policy, budget in _budgets(folded, view):
            if not math.isinf(budget) and len(pairs) > 1:
                break
            found = _solve(folded, policy, view, budget)
            if found is not None:
                other = _solve(unfolded, policy, view, budget)
                composed_s = _composed_s(program, MeshCosts(cluster, view), policy, budget)
                pairs.append(Pair(policy, budget, found, other, composed_s))
    except NotFoldable as error:
        return Compared(case.model, case.mesh, layers, (), str(error), ())
    return Compared(case.model, case.mesh, layers, folds, "", tuple(pairs))


def _budgets(forced: Forced, view: LogicalMesh) -> Iterator[tuple[Remat, float]]:
    """None, and then those that may bind, from tight to loose. Where all that can be sharded is,
    fewer bytes are only to be had from what is recomputed."""
    yield Remat.NONE, math.inf
    for policy in (Remat.NONE, Remat.FULL):
        free = forced.solve(_told(forced, policy), 0, view, ROWS_IN, IN_FLIGHT, within_budget=False)
        assert free is not None
        for share in TIGHT:
            yield policy, share * free.prediction.peak_bytes


def _told(forced: Forced, policy: Remat, breaks: frozenset[int] = frozenset()) -> ToldStages:
    """The model as one stage whose layers all recompute so."""
    return forced.cut(ROWS_IN, (0,), (policy,) * forced.program(ROWS_IN).num_layers, breaks)


def _solve(forced: Forced, policy: Remat, view: LogicalMesh, budget: float) -> Solve | None:
    """Folds are split as in a plan: while the gap is above its target and that is faster."""
    started = time.monotonic()
    forced.budget_bytes = budget
    told = _told(forced, policy)
    best = forced.solve(told, 0, view, ROWS_IN, IN_FLIGHT)
    breaks: frozenset[int] = frozenset()
    for _ in range(MAX_SPLITS):
        if best is None or best.split is None or told.window is None or best.gap <= SOLVED_GAP:
            break
        breaks |= {told.window.break_of(0, best.split)}
        told = _told(forced, policy, breaks)
        found = forced.solve(told, 0, view, ROWS_IN, IN_FLIGHT)
        if found is None or found.seconds >= best.seconds:
            break
        best = found
    return best and Solve(best.seconds, best.bound, time.monotonic() - started)


def _composed_s(program: Program, costs: MeshCosts, policy: Remat, budget: float) -> float:
    """Of layers solved each alone."""
    classes = zip(program.classes, program.prepared(policy), strict=True)
    frontiers = [
        layer_points(stage.graph, stage.table, costs, StageContext(ROWS_IN, owned=kind.owned))
        for kind, stage in classes
    ]
    counts = np.bincount(program.kind_of_layer, minlength=len(program.classes))
    return float(stage_seconds(frontiers, counts[None], IN_FLIGHT, budget)[0])


# ---- the page

HEADER = (
    "model",
    "layers",
    "folded",
    "mesh",
    "recomputes",
    "budget, GiB",
    "folded, ms",
    "gap",
    "unfolded, ms",
    "gap",
    "folded / unfolded",
    "at most",
    "composed / unfolded",
    "folded, s",
    "unfolded, s",
)


def rows(result: Compared) -> Iterator[tuple[str, ...]]:
    for pair in result.pairs:
        whole = pair.unfolded
        yield (
            result.model,
            str(result.layers),
            " + ".join(map(str, result.folds)),
            result.mesh,
            str(pair.policy),
            "free" if math.isinf(pair.budget_bytes) else f"{pair.budget_bytes / 2**30:.2f}",
            f"{pair.folded.seconds * 1e3:.3f}",
            f"{pair.folded.gap:.2%}",
            f"{whole.seconds * 1e3:.3f}" if whole else "not solved",
            (f"{whole.gap:.2%}" + ("" if pair.solved else ", not solved")) if whole else "",
            f"{pair.ratio:.4f}" if whole else "",
            f"{pair.at_most:.4f}" if whole else "",
            _composed_text(pair),
            f"{pair.folded.took_s:.1f}",
            f"{whole.took_s:.1f}" if whole else "",
        )


def _composed_text(pair: Pair) -> str:
    if pair.unfolded is None:
        return ""
    if math.isinf(pair.composed_s):
        return "nothing fits"
    return f"{pair.composed_s / pair.unfolded.seconds:.4f}"


def line(result: Compared) -> str:
    if not result.pairs:
        why = result.refused or "no run of layers to fold"
        return f"{result.model} on {result.mesh}: {why}"
    return "\n".join(" | ".join(row) for row in rows(result))


def summary(results: Sequence[Compared]) -> dict[str, object]:
    pairs = [pair for result in results for pair in result.pairs]
    facts: dict[str, object] = {}
    for name, tight in (("without a budget", False), ("under a tight budget", True)):
        some = [p for p in pairs if math.isfinite(p.budget_bytes) is tight]
        ratios = sorted(p.ratio for p in some if p.solved)
        proved = sum(p.at_most <= 1 + SOLVED_GAP for p in some)
        if ratios:
            facts[name] = (
                f"{len(some)} programs, {len(ratios)} solved unfolded; folded / unfolded: median"
                f" {ratios[len(ratios) // 2]:.4f}, most {ratios[-1]:.4f},"
                f" {sum(r > 1 + SOLVED_GAP for r in ratios)} above 1.01; {proved} of {len(some)}"
                " proved within 1 % of the unfolded optimum by its bound"
            )
    without = sorted({r.model for r in results if not r.folds and not r.refused})
    refused = sorted({f"{r.model} ({r.refused})" for r in results if r.refused})
    if without:
        facts["no run of layers to fold"] = ", ".join(without)
    if refused:
        facts["equal layers that are not folded"] = "; ".join(refused)
    return facts


def models() -> tuple[str, ...]:
    """The published sizes of the zoo, and hand-written ones."""
    from tests.zoo import SIZES  # transformers

    return (*SIZES, *OWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", metavar="NAME", help="all by default")
    parser.add_argument("--meshes", nargs="*", default=list(MESHES), choices=MESHES)
    parser.add_argument("--solve-limit", type=float, default=60.0, help="seconds of one program")
    jobs.add_arguments(parser, minutes=600.0, limit_s=900.0)
    args = parser.parse_args()
    jobs.import_all()
    cases = [
        Case(model, mesh, args.solve_limit)
        for model, mesh in itertools.product(args.models or models(), args.meshes)
    ]
    done = jobs.compared(compare, cases, args, line)
    facts = {
        **jobs.where(),
        "programs": f"{len(done.results)} of {len(cases)} models and meshes, {CLUSTER}, bf16, two"
        f" microbatches, {args.solve_limit:g} s for each program",
        **({"without a result": "; ".join(done.failures)} if done.failures else {}),
        **summary(done.results),
    }
    table = [row for result in done.results for row in rows(result)]
    text = header_text("Folded against unfolded", jobs.command("folded"), facts)
    text += "\n" + table_text(HEADER, table) + "\n"
    print(text)
    if args.write:
        jobs.write("folded-20261122", text, facts, done.results)


if __name__ == "__main__":
    main()
