"""How the programs of a stage run, as far as seconds and bytes depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

import torch

import autopar.ops  # noqa: F401  (registers autopar::cross_entropy)
from autopar.estimate import EXPOSED_SHARE, MeshCosts, exchanges_rows
from autopar.graph.program import Graph, InputKind, Operator, OutputKind, Ref
from autopar.graph.work import is_view
from autopar.intraop.stage_problem import StageContext
from autopar.ops.products import NARROW_PRODUCTS

aten = torch.ops.aten


class Execution(StrEnum):
    OPERATORS = "operators"  # one by one
    PROGRAMS = "programs"  # as compiled code: forward and backward
    STEP = "step"  # as compiled code: a whole step as one program (compile.step)


# Operators whose kernel writes over an operand of one program that is not read again: its position.
_OVERWRITTEN: Mapping[object, int] = {torch.ops.autopar.cross_entropy_backward.default: 1}
# Of rows that are a shard; else products want other sizes than the operand has (compile.alignment).
# Whole rows are given room, if the loss is joined with its gradient (compile.losses).
_ALIGN_BYTES = 16
_LEFT = (aten.convolution_backward.default, 1)


def execution_of(graph: Graph, context: StageContext) -> Execution:
    """graph: of the stage."""
    if not context.compiled:
        return Execution.OPERATORS
    alone = not (graph.inputs_of(InputKind.RECEIVED) or graph.outputs_of(OutputKind.SENT))
    return Execution.STEP if alone and _is_one_program(context) else Execution.PROGRAMS


def exposed_share(graph: Graph, costs: MeshCosts, context: StageContext) -> float:
    """Of the seconds of collectives that only parameters and their gradients need: the others are
    hidden where the step is one compiled program, which one that exchanges rows is not. graph: of
    the stage or of a layer of it, which has neighbours: the stage has none that has all devices."""
    alone = costs.mesh.num_devices == costs.cluster.num_devices
    hides = alone and _is_one_program(context) and not any(map(exchanges_rows, graph.operators))
    return EXPOSED_SHARE if hides else 1.0


def _is_one_program(context: StageContext) -> bool:
    """Whether the step of a stage that is alone is one compiled program (`compile.step`)."""
    return context.compiled and context.num_microbatches == 1 and not context.offload


def overwritten(op: Operator, execution: Execution) -> int | None:
    """The operand whose memory the result of an operator takes, by position."""
    return _OVERWRITTEN.get(op.target) if execution is Execution.STEP else None


class GradientCasts(NamedTuple):
    """Names of operators around the casts of gradients, of compiled code (`compile.gradients`).

    left: casts that are not made, as an optimizer reads what convolutions made for their weights.
    Only where no sum is pending, which is done behind the cast. A model without a process group
    does make them.
    wide: products that are made in the type of the cast behind them, and not in their own.
    """

    left: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()


def gradient_casts(graph: Graph, execution: Execution) -> GradientCasts:
    """O(edges)."""
    if execution is Execution.OPERATORS:
        return GradientCasts()
    makers = {ref: op for op in graph.operators for ref in op.refs}
    readers = graph.readers()
    outputs = {out.ref for out in graph.outputs}

    def is_read_once(ref: Ref) -> bool:
        return len(readers.get(ref, ())) == 1 and ref not in outputs

    left, wide = set(), set()
    for out in graph.outputs_of(OutputKind.GRADIENT):
        cast = makers.get(out.ref)
        if cast is None or cast.target is not aten._to_copy.default or out.ref in readers:
            continue
        source = cast.operands[0]
        while is_read_once(source) and source in makers and is_view(makers[source]):
            source = makers[source].operands[0]
        if source not in makers or not is_read_once(source):
            continue
        maker = makers[source]
        if maker.target in NARROW_PRODUCTS:
            wide.add(maker.name)
        elif (maker.target, source.index) == _LEFT and source == cast.operands[0]:
            left.add(cast.name)
    return GradientCasts(frozenset(left if execution is Execution.STEP else ()), frozenset(wide))


def is_aligned(row: int, dtype: torch.dtype) -> bool:
    """Whether products take rows of so many elements as they are."""
    return row * dtype.itemsize % _ALIGN_BYTES == 0
