"""How the programs of a stage run, as far as seconds and bytes depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import torch

import autopar.ops  # noqa: F401  (registers autopar::cross_entropy)
from autopar.estimate import EXPOSED_SHARE, MeshCosts, exchanges_rows
from autopar.graph.program import Graph, InputKind, Operator, OutputKind, Ref
from autopar.intraop.stage_problem import StageContext

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


def left_as_made(graph: Graph, execution: Execution) -> frozenset[str]:
    """Names of the casts of gradients that are not made: an optimizer reads what convolutions made
    for their weights (`compile.gradients`)."""
    if execution is not Execution.STEP:
        return frozenset()
    gradients = {out.ref for out in graph.outputs_of(OutputKind.GRADIENT)}
    of_weights = {
        Ref(op.name, 1) for op in graph.operators if op.target is aten.convolution_backward.default
    }
    return frozenset(
        op.name
        for op in graph.operators
        if op.target is aten._to_copy.default
        and gradients.issuperset(op.refs)
        and op.operands[0] in of_weights
    )


def is_aligned(row: int, dtype: torch.dtype) -> bool:
    """Whether products take rows of so many elements as they are."""
    return row * dtype.itemsize % _ALIGN_BYTES == 0
