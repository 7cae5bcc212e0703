"""Plays what Inductor is given, operator by operator, for all ranks of a virtual mesh: the check of
tracing and of the order that `compile.passes` make, without a compiler.

Each rank runs a graph of its own up to its next collective; there all must ask for the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from autopar.compile.passes import prepare
from autopar.compile.trace import is_traceable, trace
from autopar.errors import VerificationError
from autopar.lowering.collectives import STARTS, WAIT, collective_of
from autopar.lowering.program import LocalProgram
from autopar.mesh import LogicalMesh
from autopar.runtime.interpreter import PlayerMaker, ProgramPlayer, Shards, interpreter
from autopar.runtime.virtual import VirtualCollectives


def tracer(mesh: LogicalMesh, parameters: Collection[str], device: torch.device) -> PlayerMaker:
    """Makes players for all ranks of the mesh; programs that cannot be traced are interpreted.
    parameters: inputs that are there before the step."""
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.num_devices)]
    otherwise = interpreter(coordinates, VirtualCollectives(mesh), device)

    def make(program: LocalProgram) -> ProgramPlayer:
        if not program.body or not is_traceable(program):
            return otherwise(program)
        return _TracedProgram(program, mesh, coordinates, parameters, device)

    return make


class _TracedProgram:
    """Traced at its first call, once for each rank."""

    lends = False

    def __init__(
        self,
        program: LocalProgram,
        mesh: LogicalMesh,
        coordinates: Sequence[tuple[int, ...]],
        parameters: Collection[str],
        device: torch.device,
    ) -> None:
        self._program, self._coordinates = program, coordinates
        self._collectives = VirtualCollectives(mesh)
        self._groups = [(f"axis{i}", size) for i, size in enumerate(mesh.axis_sizes)]
        self._constants = [t.to(device) for t in program.constants.values()]
        self._early = [i for i, key in enumerate(program.inputs) if key in parameters]
        self._graphs: list[fx.GraphModule] = []

    def prepare(self, examples: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
        del examples, mode
        return {}

    def __call__(self, inputs: MutableMapping[str, Shards]) -> dict[str, Shards]:
        values = [inputs.pop(key) for key in self._program.inputs]
        inputs.clear()
        ranks = [
            [value[rank] for value in values] + self._constants
            for rank in range(len(self._coordinates))
        ]
        if not self._graphs:
            for coords, own in zip(self._coordinates, ranks, strict=True):
                module = trace(self._program, own, coordinates=coords, groups=self._groups)
                self._graphs.append(prepare(module, self._early))
        del values
        outputs = self._play([_steps(g, v) for g, v in zip(self._graphs, ranks, strict=True)])
        return dict(zip(self._program.outputs, map(list, zip(*outputs, strict=True)), strict=True))

    def _play(self, ranks: Sequence[_Steps]) -> list[list[Tensor]]:
        """The outputs of each rank."""
        results: Shards | None = None
        while True:
            asked: list[tuple[fx.Node, Tensor]] = []
            ended: list[list[Tensor]] = []
            for rank, steps in enumerate(ranks):
                try:
                    asked.append(next(steps) if results is None else steps.send(results[rank]))
                except StopIteration as end:
                    ended.append(end.value)
            if not asked:
                return ended
            calls = {(node.target, node.args[1:]) for node, _ in asked}
            if ended or len(calls) > 1:
                raise VerificationError(f"ranks meet in different collectives: {calls}")
            op, group, reduce = collective_of(asked[0][0])
            axis = [name for name, _ in self._groups].index(group)
            results = self._collectives.run(op, [value for _, value in asked], axis, reduce)


_Steps = Generator[tuple[fx.Node, Tensor], Tensor, list[Tensor]]


def _steps(module: fx.GraphModule, inputs: Sequence[Tensor]) -> _Steps:
    """Plays the graph; yields each collective with its operand and is sent its result."""
    values: dict[fx.Node, Any] = {}
    left = iter(inputs)
    for node in module.graph.nodes:
        args = fx.node.map_arg(node.args, values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif node.op == "output":
            return list(args[0])
        elif node.target in STARTS:
            values[node] = yield node, args[0]
        elif node.target is WAIT:
            values[node] = args[0]
        else:
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    raise VerificationError("the graph has no outputs")
