"""A local program of one rank as a flat torch.fx graph of ATen operators and collectives.

The program, with repeated heads read once (`compile.heads`), losses beside their gradients, of
scores with aligned rows (`compile.losses`), and activations in products (`compile.epilogues`), is
played once on fake tensors and recorded: operators decompose into what Inductor lowers, arguments
that differ between ranks become this rank's numbers.
A collective starts where its instruction stands and is waited for by its first reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.epilogues import join_activations
from autopar.compile.heads import group_heads
from autopar.compile.kernels import decompositions
from autopar.compile.losses import align_scores, join_losses
from autopar.errors import InternalError
from autopar.graph.program import Ref
from autopar.layout import Offset
from autopar.lowering.collectives import WAIT, start
from autopar.lowering.program import (
    Communicate,
    Compute,
    Exchange,
    LocalProgram,
)
from autopar.ops.random import random_op_ids

# Inductor promotes the operand of a collective with the size of the group, as if it were added: a
# boolean becomes int64 (torch 2.11, 2.13), and `~` of it true everywhere.
_TRAVELS_AS = {torch.bool: torch.uint8}


def is_traceable(program: LocalProgram) -> bool:
    """Whether all shapes are known and all values are on the device: not where rows are exchanged
    in numbers that are values, nor where parameters come from the host."""
    on_host = any(port.host for port in program.inputs.values())
    return not on_host and not any(isinstance(i, Exchange) for i in program.body)


def trace(
    program: LocalProgram,
    inputs: Sequence[Tensor],
    *,
    coordinates: tuple[int, ...],
    groups: Sequence[tuple[str, int]],
) -> fx.GraphModule:
    """inputs: examples of the program's inputs, then of its constants, in their order. groups: name
    and size of each mesh axis's process group. The graph returns the outputs in their order.
    Pre: is_traceable."""
    program = join_activations(align_scores(join_losses(group_heads(program))))
    names = [port.ref.name for port in program.inputs.values()] + list(program.constants)

    def play(*tensors: Tensor) -> list[Tensor]:
        values = _Values(dict(zip(names, tensors, strict=True)), coordinates, inputs[0].device)
        for instruction in program.body:
            if isinstance(instruction, Communicate):
                shard, (group, size) = values.read(instruction.operand), groups[instruction.axis]
                sent = shard.to(_TRAVELS_AS.get(shard.dtype, shard.dtype))
                begun = start(instruction.op, sent, group, size, instruction.reduce)
                values.start(instruction.name, begun, shard.dtype)
            elif isinstance(instruction, Exchange):
                raise InternalError(f"{instruction.name} exchanges rows in unknown numbers")
            else:
                args, kwargs = values.bind(instruction.args), values.bind(instruction.kwargs)
                values.made[instruction.name] = instruction.target(*args, **kwargs)
        return [values.read(port.ref) for port in program.outputs.values()]

    calls = [i for i in program.body if isinstance(i, Compute)]
    random = [op_id for call in calls for op_id in random_op_ids(call.target, call.args)]
    with torch.no_grad():
        graph: fx.GraphModule = make_fx(
            play, decomposition_table=decompositions(random), tracing_mode="fake"
        )(*inputs)
    graph.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return graph


class _Values:
    """What a program has made so far."""

    def __init__(
        self, made: dict[str, Any], coordinates: tuple[int, ...], device: torch.device
    ) -> None:
        self.made = made
        self._coordinates, self._device = coordinates, device
        self._started: dict[str, torch.dtype] = {}

    def start(self, name: str, result: Tensor, dtype: torch.dtype) -> None:
        """dtype: of the value that travels."""
        self.made[name] = result
        self._started[name] = dtype

    def read(self, ref: Ref) -> Any:
        dtype = self._started.pop(ref.name, None)
        if dtype is not None:
            self.made[ref.name] = WAIT(self.made[ref.name]).to(dtype)
        value = self.made[ref.name]
        return value[ref.index] if isinstance(value, (tuple, list)) else value

    def bind(self, tree: Any) -> Any:
        """Arguments of this rank on this device."""
        if isinstance(tree, Ref):
            return self.read(tree)
        if isinstance(tree, Offset):
            return tree.at(self._coordinates)
        if isinstance(tree, (tuple, list)):
            return type(tree)(map(self.bind, tree))
        if isinstance(tree, torch.device):  # captured on fake cpu
            return self._device
        if hasattr(tree, "items"):
            return {key: self.bind(item) for key, item in tree.items()}
        return tree
