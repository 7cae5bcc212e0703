"""Transient bytes of a stage: the largest live set while one phase of one microbatch runs.

Values live from the operator that makes them to their last reader, in the order of the program; so do
the copies that reshards make, parameter gathers included. What stands through the step (parameters,
accumulated gradients) and what is saved for backward is counted elsewhere. O(values log values).
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.estimate import local_bytes
from autopar.graph.program import Graph, InputKind, Phase, Ref
from autopar.graph.work import is_view
from autopar.layout import Layout
from autopar.sharding.strategy import Strategy

_HUB = "autopar.hub.default"
_SAVE = "__save"

_Copy = tuple[Ref, Layout]


def transient_bytes(
    graph: Graph,
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
) -> float:
    """The larger of forward's and backward's largest live set, bytes per device.

    inputs: layout in which each graph input stands. sizes: of the mesh axes.
    """
    return max(_phase_bytes(graph, strategies, inputs, sizes, phase) for phase in Phase)


def _phase_bytes(
    graph: Graph,
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
    phase: Phase,
) -> float:
    metas = graph.metas()
    root: dict[Ref, _Copy] = {}  # value -> the allocation that it aliases, in the layout it is made in
    born: dict[_Copy, int] = {}
    last: dict[_Copy, int] = {}
    standing: set[_Copy] = set()
    for inp in graph.inputs:
        copy = (inp.ref, inputs[inp.name])
        root[inp.ref] = copy
        standing.add(copy)
        if inp.kind is InputKind.RECEIVED and inp.phase is phase:
            standing.discard(copy)
            born[copy] = 0
    saved_roots = {
        op.operands[0]: strategies[op.name].results[0]
        for op in graph.operators
        if op.op_name == _HUB and op.name.endswith(_SAVE)
    }
    time = 0
    for op in graph.operators:
        strategy = strategies[op.name]
        if op.phase is not phase:
            for index, layout in enumerate(strategy.results):  # saved values, already counted
                ref = Ref(op.name, index)
                root[ref] = (ref, layout)
                standing.add(root[ref])
            continue
        time += 1
        for ref, layout in zip(op.operands, strategy.operands, strict=True):
            base, made_in = root[ref]
            copy = (base, made_in) if layout == made_in else (ref, layout)
            if copy not in standing:
                born.setdefault(copy, time)
                last[copy] = time
            if (base, made_in) not in standing:
                last[base, made_in] = time
        aliases = is_view(op) or op.op_name == _HUB
        for index, meta in enumerate(op.results):
            ref = Ref(op.name, index)
            if meta is None:
                continue
            layout = strategy.results[index]
            source = op.operands[0] if op.operands else ref
            if aliases and op.operands and root[source][1] == layout == strategy.operands[0]:
                root[ref] = root[source]
                continue
            root[ref] = (ref, layout)
            is_saved = phase is Phase.FORWARD and saved_roots.get(ref) == layout
            if is_saved or op.name.endswith(_SAVE):
                standing.add((ref, layout))
            else:
                born[ref, layout] = time
                last.setdefault((ref, layout), time)
    return _peak(born, last, {c: local_bytes(metas[c[0]], c[1], sizes) for c in born})


def _peak(
    born: Mapping[_Copy, int], last: Mapping[_Copy, int], size: Mapping[_Copy, float]
) -> float:
    """Largest sum of sizes alive at one time."""
    events: list[tuple[int, int, float]] = []
    for copy, start in born.items():
        events.append((start, 0, size[copy]))
        events.append((last.get(copy, start), 1, -size[copy]))
    alive = peak = 0.0
    for _, _, change in sorted(events):
        alive += change
        peak = max(peak, alive)
    return peak
