"""What a stage holds at its most crowded moment, as bytes of its program's choices.

Transients lie outside of the integer program (`intraop.memory_use`), but at one moment t of a phase
most of them follow from the strategies one by one: a value that is alive has the bytes of its own
layout, whatever else there is. So

    peak >= row + T_t,    T_t = sum over values alive at t of bytes(v) - what the row counts of them
                                and of all saved values

holds for every assignment, and its right side is a row of the same program: a bound within the
budget is one for the stage, and what fits it nearly always fits. Copies in other layouts,
workspaces and values that arrive are left out, which only weakens it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from autopar.graph.hubs import holds_nothing, is_hub, is_save
from autopar.graph.program import Graph, OutputKind, Phase, Ref
from autopar.intraop.execution import Execution, gradient_casts, overwritten
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.stage_problem import StageProblem, weight
from autopar.layout import local_share
from autopar.sharding.strategy import Strategy


def with_moment(
    graph: Graph,
    built: StageProblem,
    moment: tuple[Phase, int],
    sizes: tuple[int, ...],
    execution: Execution = Execution.OPERATORS,
) -> IntraOpProblem:
    """The program whose row is what stands, what is saved and T_t. moment: t, by the operators of a
    phase, the first of which is at 1. sizes: of the mesh axes. execution: of the stage."""
    phase, time = moment
    metas = graph.metas()
    more = [np.zeros_like(m_v) for m_v in built.problem.node_bytes]
    number = {n.name: i for i, n in enumerate(built.nodes) if n.kind == "operator"}
    number |= {n.name: i for n, i in built.twins if n.kind == "operator"}

    def hold(times: float, ref: Ref, memory: Ref) -> None:
        """So often the bytes of a value as it is made, in the memory of another one."""
        node = number[ref.name]
        nbytes = [
            local_share(built.dims[ref], choice.results[ref.index], sizes)
            for choice in built.nodes[node].choices
            if isinstance(choice, Strategy)
        ]
        whole = min(metas[ref].nbytes, metas[memory].nbytes)
        more[node] += times * whole * np.array(nbytes)

    for op in graph.operators:
        if is_save(op):
            hold(-weight(built.copies, op.name), Ref(op.name), Ref(op.name))
    for ref, memory, times in _alive(graph, built, phase, time, execution):
        hold(times, ref, memory)
    pairs = zip(built.problem.node_bytes, more, strict=True)
    node_bytes = tuple(np.maximum(0.0, m_v + more_v) for m_v, more_v in pairs)
    return replace(built.problem, node_bytes=node_bytes)


def _alive(
    graph: Graph, built: StageProblem, phase: Phase, time: int, execution: Execution
) -> Iterator[tuple[Ref, Ref, float]]:
    """A value of each memory of the phase that is alive then, the value that it is the memory of,
    and how often it is there: more than once in folded layers, of which not all are written."""
    casts = gradient_casts(graph, execution)
    roots: dict[Ref, Ref] = {}
    born: dict[Ref, int] = {}
    last: dict[Ref, int] = {}  # when a value is read, itself and not a view of it
    turns: dict[int, int] = {}  # fold -> when the later of its copies begins
    kept: dict[Ref, str] = {}  # what stays to the end of the phase -> whose
    later = 1 if phase is Phase.FORWARD else 0
    now = 0
    for op in graph.operators:
        if op.phase is not phase:
            if is_save(op) and phase is Phase.BACKWARD:
                born[Ref(op.name)] = 0
            continue
        now += 1
        copy = built.copies.get(op.name)
        if copy is not None and copy.which == later and not is_hub(op):
            turns.setdefault(copy.fold, now)
        for ref in op.operands:
            last[ref] = now
        aliases = bool(op.operands) and (holds_nothing(op) or op.name in casts.left)
        place = 0 if aliases else overwritten(op, execution)
        for ref in () if op.name in casts.wide else op.refs:
            born[ref] = now
            if place is not None:
                roots[ref] = roots.get(op.operands[place], op.operands[place])
        if is_save(op):
            kept[Ref(op.name)] = op.name
    for out in graph.outputs:
        last[out.ref] = now + 1
        if out.kind in (OutputKind.GRADIENT, OutputKind.BUFFER):
            kept.setdefault(out.ref, out.target)
    seen: set[Ref] = set()
    for ref in sorted(born, key=lambda ref: ref not in kept):  # what is saved stands for its memory
        root, start = roots.get(ref, ref), born[ref]
        stop = now + 1 if ref in kept else last.get(ref, start)
        if root in born and start <= time <= stop and root not in seen:
            seen.add(root)
            copy = built.copies.get(kept.get(ref, ref.name))
            if copy is None:
                yield ref, root, 1.0
                continue
            arrives = turns.get(copy.fold, now + 1)  # what is not written is there since, or until
            unwritten = (
                copy.which == 0 and time >= arrives
                if ref in kept
                else start == 0 and copy.which == 1 and time < arrives
            )
            yield ref, root, 1.0 + (copy.times - 2) * unwritten
