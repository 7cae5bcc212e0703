"""When nothing fits: what comes closest, what binds in it, and the smallest change that would fit.

The closest plan minimises the most bytes of any stage: the inter-op program over bytes in place of
seconds, with so many microbatches that its maximum counts alone, over the smallest point of each
layer. Views are priced in full as its path goes, as in the search itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.graph.program import InputKind
from autopar.interop import dp
from autopar.interop.problem import InterOpProblem, InterOpSolution
from autopar.intraop.compose import Frontier, layer_sums, smallest_points
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from autopar.search.cuts import CutSearch
from autopar.search.prices import Level
from autopar.search.program import Program

_ONLY_THE_MAXIMUM = 10**6  # microbatches
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Closest:
    """A cut of least bytes on its busiest device, and that stage. Bytes per device."""

    num_microbatches: int
    num_stages: int
    nbytes: float
    stage: int
    layers: tuple[int, int]
    view: LogicalMesh
    standing: float
    saved: float
    in_flight: int
    transient: float


def closest_plan(search: CutSearch) -> Closest | None:
    """With the most microbatches, which need the fewest bytes. None where no cut exists at all."""
    count = search.space.microbatch_counts[-1]
    tables = search.tables(count)
    while True:
        problem = tables.refresh()
        frontiers = _frontiers(search, count)
        found = _least(search, problem, frontiers, count)
        if found is None:
            return None
        closest, view = found
        if search.prices.level(view, count) is Level.FULL:
            return closest
        search.raise_views({view: False}, count)


def _frontiers(search: CutSearch, count: int) -> dict[LogicalMesh, tuple[Frontier, ...]]:
    return {
        view: search.prices.frontiers(view, count)
        for submesh in search.usable(count)
        for view in search.space.views[submesh]
    }


def _least(
    search: CutSearch,
    problem: InterOpProblem,
    frontiers: dict[LogicalMesh, tuple[Frontier, ...]],
    count: int,
) -> tuple[Closest, LogicalMesh] | None:
    flights = search.tables(count).rows
    whole = search.counts.max(axis=0)
    need: dict[LogicalMesh, np.ndarray[tuple[int, int], np.dtype[np.float64]]] = {}
    for view, points in frontiers.items():
        known = search.prices.optimistic(view, count)
        rows = []
        for flight in flights:
            if search.prices.level(view, count) is Level.FULL:
                small = smallest_points(points, whole, flight)
                nbytes = np.array([p.standing_bytes + flight * p.saved_bytes for p in small])
                spikes = np.array([p.transient_bytes for p in small])
            else:  # it is priced when it is on the path
                small = smallest_points(known, whole, flight) if known else ()
                nbytes = np.array([p.standing_bytes + flight * p.saved_bytes for p in small])
                nbytes = nbytes if known else np.zeros(len(points))
                spikes = np.zeros(len(points))
            most = ((search.counts > 0) * spikes).max(axis=1)
            rows.append(layer_sums(nbytes[None], search.counts)[0] + most)
        need[view] = np.stack(rows)
    layers, submeshes = problem.transfer_seconds.shape
    table = np.full((len(flights), layers, layers, submeshes), np.inf)
    first, last = np.triu_indices(problem.num_layers)
    index = search.index[first, last]
    for m, submesh in enumerate(search.space.submeshes):
        tables = [need[v] for v in search.space.views[submesh] if v in need]
        if tables:
            table[:, first, last, m] = np.min(tables, axis=0)[:, index]
    program = replace(
        problem,
        stage_seconds=table,
        transfer_seconds=np.zeros_like(problem.transfer_seconds),
        num_microbatches=_ONLY_THE_MAXIMUM,
        min_stages=search.space.options.num_stages or 1,
    )
    try:
        found: InterOpSolution = dp.solve(program, relative_gap=1e-3)
    except NoFeasiblePlan:
        return None
    position = int(np.argmax([s.seconds for s in found.stages]))
    worst = found.stages[position]
    row = search.index[worst.first_layer, worst.last_layer]
    views = [v for v in search.space.views[search.space.submeshes[worst.submesh]] if v in need]
    view = min(views, key=lambda v: float(need[v][worst.in_flight - 1, row]))
    flight = flights[worst.in_flight - 1]
    small = smallest_points(frontiers[view], whole, flight)
    counts = search.counts[row]

    def kept(nbytes: Iterable[float]) -> float:
        return math.fsum(n * b for n, b in zip(counts.tolist(), nbytes, strict=True))

    closest = Closest(
        num_microbatches=count,
        num_stages=len(found.stages),
        nbytes=worst.seconds,
        stage=position,
        layers=(worst.first_layer, worst.last_layer),
        view=view,
        standing=kept(p.standing_bytes for p in small),
        saved=kept(p.saved_bytes for p in small),
        in_flight=flight,
        transient=float(max(p.transient_bytes for p, n in zip(small, counts, strict=True) if n)),
    )
    return closest, view


def explain(search: CutSearch, program: Program) -> NoFeasiblePlan | None:
    """The error of a search that found nothing, None where no cut exists whatever the budget.
    program: of the closest plan's microbatches."""
    space = search.space
    closest = closest_plan(search)
    if closest is None:
        return None
    names = program.folded.layer_names
    first, last = closest.layers
    layers = names[first] if first == last else f"{names[first]} .. {names[last]}"
    saved = closest.in_flight * closest.saved
    text = (
        f"nothing fits the budget of {min(space.budgets) / _GIB:.2f} GiB per device on"
        f" {space.cluster}. The closest plan ({closest.num_stages} stage"
        f"{'s' if closest.num_stages > 1 else ''}, {closest.num_microbatches} microbatch"
        f"{'es' if closest.num_microbatches > 1 else ''}) needs about"
        f" {closest.nbytes / _GIB:.2f} GiB in stage {closest.stage} ({layers}, mesh"
        f" {closest.view}): parameters, gradients and optimizer {closest.standing / _GIB:.2f},"
        f" saved for backward {saved / _GIB:.2f} ({closest.in_flight} in flight), transient"
        f" {closest.transient / _GIB:.2f}; largest parameters:"
        f" {_largest_parameters(program, closest)}. Way out: {_way_out(search, closest)}."
    )
    return NoFeasiblePlan(text, least_bytes=closest.nbytes)


def _largest_parameters(program: Program, closest: Closest) -> str:
    """Of the layers of the folded graph that the stage's layers are."""
    first, last = closest.layers
    kinds = set(program.kind_of_layer[first : last + 1].tolist())
    graph = program.folded.graph
    layers = {n for n, kind in enumerate(program.kind_of_written) if kind in kinds}
    read = {ref for op in graph.operators if op.layer in layers for ref in op.operands}
    found = {
        i.owner: i.rest_meta.nbytes for i in graph.inputs_of(InputKind.PARAMETER) if i.ref in read
    }
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:2]
    return ", ".join(f"{name} ({nbytes / _GIB:.2f} GiB whole)" for name, nbytes in ranked) or "none"


def _way_out(search: CutSearch, closest: Closest) -> str:
    """The smallest change of one thing: the budget's is computed, of pins it is said that they
    bind."""
    space, options = search.space, search.space.options
    ways = [f"a budget of {closest.nbytes / _GIB:.2f} GiB"]
    if options.remat is not None and options.remat is not Remat.FULL:
        ways.append(f"drop the pin remat={options.remat}")
    if options.num_microbatches is not None:
        ways.append(f"more microbatches than the {options.num_microbatches} that are pinned")
    elif closest.saved + closest.transient > closest.standing:
        ways.append("fewer rows in a microbatch: what binds grows with them, and one row is least")
    if options.num_stages is not None:
        ways.append(f"drop the pin num_stages={options.num_stages}")
    if options.mesh_shape is not None:
        ways.append("drop the pin mesh_shape")
    factor = closest.nbytes / min(space.budgets)
    ways.append(f"about {factor:.1f} times the devices")
    return "; or ".join(ways)
