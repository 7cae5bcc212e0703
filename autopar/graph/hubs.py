"""Hubs: points at which a value may change its layout once for all of its readers.

With plain per-edge costs a value that is resharded once and read three times would pay three times.
Behind every value with several readers in one phase stands an identity operator, the hub, whose
layout is free; a value that backward reads passes through another one, the **save**, whose layout
is the one in which it is kept, so that saved bytes belong to that operator. Hubs cost nothing where
layouts agree: the lowering makes no instruction for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

import autopar.ops  # noqa: F401  registers autopar::hub
from autopar.graph.program import (
    Graph,
    InputKind,
    Operator,
    Phase,
    Ref,
    TensorMeta,
    check_graph,
)
from autopar.graph.work import is_view

HUB = torch.ops.autopar.hub.default
SAVE_SUFFIX = "__save"
FORWARD_SUFFIX = "__hub"
BACKWARD_SUFFIX = "__hubb"

# Inputs that exist in both phases without being saved.
_STANDING = (InputKind.PARAMETER, InputKind.BATCH, InputKind.CONSTANT, InputKind.BUFFER)


def is_hub(op: Operator) -> bool:
    return op.target is HUB


def is_save(op: Operator) -> bool:
    """A hub that keeps a forward value for backward."""
    return is_hub(op) and op.name.endswith(SAVE_SUFFIX)


def holds_nothing(op: Operator) -> bool:
    """Whether its value is in the memory of its first operand, or, inlined, in none of its own."""
    return is_view(op) or is_hub(op) or op.inlined


@dataclass(slots=True)
class _Builder:
    """The new operator list, and by which name each phase reads a value."""

    operators: list[Operator] = field(default_factory=list)
    forward: dict[Ref, Ref] = field(default_factory=dict)
    backward: dict[Ref, Ref] = field(default_factory=dict)
    late: dict[Ref, Operator] = field(default_factory=dict)  # backward hubs awaiting a first reader

    def emit(self, ref: Ref, source: Ref, suffix: str, meta: TensorMeta, layer: int) -> Ref:
        node = _hub(ref, source, suffix, Phase.FORWARD, meta, layer)
        self.operators.append(node)
        return Ref(node.name)


def insert_hubs(graph: Graph) -> Graph:
    """Post: check_graph; what backward reads of forward is the result of a save (graph inputs that
    stand through the step excepted), and a value with several readers in a phase has one hub for
    them. O(edges)."""
    metas = graph.metas()
    readers = graph.readers()
    outputs = {out.ref for out in graph.outputs}
    build = _Builder()
    for inp in graph.inputs:
        standing = inp.kind in _STANDING
        if standing or inp.kind is InputKind.RECEIVED:
            _follow(
                build, inp.ref, inp.phase, readers.get(inp.ref, []), metas[inp.ref],
                saved=not standing, sent=False,
            )  # fmt: skip
    for op in graph.operators:
        names = build.forward if op.phase is Phase.FORWARD else build.backward
        if op.phase is Phase.BACKWARD:
            for ref in dict.fromkeys(op.operands):
                if ref in build.late:
                    build.operators.append(build.late.pop(ref).changed(layer=op.layer))
        build.operators.append(op.reading(partial(_renamed, names)))
        for ref in op.refs:
            _follow(
                build, ref, op.phase, readers.get(ref, []), metas[ref],
                saved=True, sent=ref in outputs,
            )  # fmt: skip
    new_outputs = tuple(replace(o, ref=build.forward.get(o.ref, o.ref)) for o in graph.outputs)
    return check_graph(replace(graph, operators=tuple(build.operators), outputs=new_outputs))


def _follow(
    build: _Builder,
    ref: Ref,
    phase: Phase,
    readers: Sequence[Operator],
    meta: TensorMeta,
    *,
    saved: bool,
    sent: bool,
) -> None:
    """The hubs that follow a value. sent: it is also an output of the graph."""
    forward = [op for op in readers if op.phase is Phase.FORWARD]
    backward = [op for op in readers if op.phase is Phase.BACKWARD]
    current = ref
    if phase is Phase.FORWARD:
        saved = saved and bool(backward)
        layer = forward[0].layer if forward else backward[0].layer if backward else -1
        if len(forward) + saved + sent > 1:
            current = build.emit(ref, ref, FORWARD_SUFFIX, meta, layer)
            build.forward[ref] = current
        if saved:
            current = build.emit(ref, current, SAVE_SUFFIX, meta, layer)
            build.backward[ref] = current
        elif len(forward) + saved + sent > 1:
            current = ref  # a standing input: backward starts from it, not from forward's hub
    if len(backward) > 1 or (phase is Phase.BACKWARD and len(backward) + sent > 1):
        node = _hub(ref, current, BACKWARD_SUFFIX, Phase.BACKWARD, meta, backward[0].layer)
        build.late[ref] = node
        build.backward[ref] = Ref(node.name)


def _renamed(names: Mapping[Ref, Ref], ref: Ref) -> Ref:
    return names.get(ref, ref)


def _hub(
    ref: Ref, source: Ref, suffix: str, phase: Phase, meta: TensorMeta, layer: int
) -> Operator:
    name = str(ref) + suffix
    return Operator(name, HUB, (source,), {}, (meta,), phase, layer=layer)
