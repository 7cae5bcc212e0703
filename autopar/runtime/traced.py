"""Plays what Inductor is given, operator by operator, for all ranks of a virtual mesh: the check of
tracing and of the order that `compile.passes` make, without a compiler.

Each rank runs a graph of its own up to its next collective; there all must ask for the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from autopar.compile.passes import prepare
from autopar.compile.peers import Peers, Place, copy_between_peers
from autopar.compile.trace import is_traceable, trace
from autopar.errors import VerificationError
from autopar.lowering.collectives import STARTS, WAIT, collective_of
from autopar.lowering.program import LocalProgram
from autopar.mesh import LogicalMesh
from autopar.ops.peers import PEER_COPY, PEER_WAIT, spoil
from autopar.runtime.interpreter import PlayerMaker, ProgramPlayer, Shards, interpreter
from autopar.runtime.virtual import VirtualCollectives


def tracer(
    mesh: LogicalMesh,
    parameters: Collection[str],
    device: torch.device,
    *,
    peer_copies: bool = False,
) -> PlayerMaker:
    """Makes players for all ranks of the mesh; programs that cannot be traced are interpreted.
    parameters: inputs that are there before the step. peer_copies: whether ranks write into each
    other's memory (`compile.peers`)."""
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.num_devices)]
    otherwise = interpreter(coordinates, VirtualCollectives(mesh), device)

    def make(program: LocalProgram) -> ProgramPlayer:
        if not program.body or not is_traceable(program):
            return otherwise(program)
        return _TracedProgram(
            program, mesh, coordinates, parameters, device, peer_copies=peer_copies
        )

    return make


class _TracedProgram:
    """Traced at its first call, once for each rank."""

    lends = False
    addends: Mapping[str, Tensor] = {}

    def __init__(
        self,
        program: LocalProgram,
        mesh: LogicalMesh,
        coordinates: Sequence[tuple[int, ...]],
        parameters: Collection[str],
        device: torch.device,
        *,
        peer_copies: bool,
    ) -> None:
        self._program, self._coordinates = program, coordinates
        self._collectives = VirtualCollectives(mesh)
        self._copies = peer_copies
        self._places: Mapping[str, Place] = {}  # by the name of the input
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
                self._graphs.append(self._trace(coords, own))
        for own in ranks:
            own += [own[0].new_empty(p.numel, dtype=p.dtype) for p in self._places.values()]
        del values
        outputs = self._play([_steps(g, v) for g, v in zip(self._graphs, ranks, strict=True)])
        return dict(zip(self._program.outputs, map(list, zip(*outputs, strict=True)), strict=True))

    def _trace(self, coordinates: tuple[int, ...], inputs: Sequence[Tensor]) -> fx.GraphModule:
        module = trace(self._program, inputs, coordinates=coordinates, groups=self._groups)
        module = prepare(module, self._early)
        if self._copies:
            axes = zip(self._groups, coordinates, strict=True)
            peers = {name: Peers(rank, size) for (name, size), rank in axes}
            module, exchange = copy_between_peers(module, peers, self._early)
            found = exchange.places
            inputs = module.graph.find_nodes(op="placeholder")[-len(found) :] if found else []
            places = {node.name: place for node, place in zip(inputs, found, strict=True)}
            if self._graphs and places != self._places:
                raise VerificationError(f"ranks want different places: {places}, {self._places}")
            self._places = places
        return module

    def _play(self, ranks: Sequence[_Steps]) -> list[list[Tensor]]:
        """The outputs of each rank."""
        results: Shards | None = None
        sent: dict[str, list[_Call]] = {}  # copies on their way, by the place's name
        while True:
            asked: list[_Call] = []
            ended: list[list[Tensor]] = []
            for rank, steps in enumerate(ranks):
                try:
                    asked.append(next(steps) if results is None else steps.send(results[rank]))
                except StopIteration as end:
                    ended.append(end.value)
            if not asked:
                return ended
            calls = {(call.target, call.options) for call in asked}
            if ended or len(calls) > 1:
                raise VerificationError(f"ranks meet in different collectives: {calls}")
            results = self._meet(asked, sent)

    def _meet(self, asked: list[_Call], sent: dict[str, list[_Call]]) -> Shards:
        """The results of one call on each rank. What a copy brings is there when it was waited for;
        before, places hold nonsense."""
        first = asked[0]
        if first.target is PEER_COPY:
            sent[str(first.options[0])] = asked
            for call in asked:
                spoil(call.operands[1])
        elif first.target is PEER_WAIT:
            copies = sent.pop(str(first.options[0]))
            _, scatter, own = copies[0].options
            values, places = zip(*(call.operands for call in copies), strict=True)
            self._collectives.copy(values, places, self._axis(first.options[0]), scatter, own)
        else:
            op, group, reduce = collective_of(first.node)
            shards = [call.operands[0] for call in asked]
            return self._collectives.run(op, shards, self._axis(group), reduce)
        return [call.operands[-1] for call in asked]

    def _axis(self, name: str) -> int:
        """Of a group, or of the place of that name."""
        names = [group for group, _ in self._groups]
        return names.index(self._places[name].group if name in self._places else name)


class _Call(NamedTuple):
    """What a rank asks for, and waits for the others to ask for. options: alike on all ranks."""

    node: fx.Node
    target: Any
    options: tuple[Any, ...]
    operands: tuple[Tensor, ...]


_Steps = Generator[_Call, Tensor, list[Tensor]]


def _steps(module: fx.GraphModule, inputs: Sequence[Tensor]) -> _Steps:
    """Plays the graph; yields each collective with its operands and is sent its result."""
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
            values[node] = yield _Call(node, node.target, node.args[1:], args[:1])
        elif node.target is PEER_COPY:
            yield _Call(node, node.target, (node.args[1].name, *node.args[2:]), args[:2])
        elif node.target is PEER_WAIT:
            yield _Call(node, node.target, (node.args[0].name,), args[:1])
        elif node.target is WAIT:
            values[node] = args[0]
        else:
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    raise VerificationError("the graph has no outputs")
