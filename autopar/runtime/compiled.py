"""Plays a local program as compiled code, for the one rank of a real job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from autopar.compile.choices import Choose, choose_kernels
from autopar.compile.inductor import CompiledModule, compile_module
from autopar.compile.passes import prepare
from autopar.compile.peers import Exchange, copy_between_peers
from autopar.compile.trace import is_traceable, trace
from autopar.lowering.program import LocalProgram
from autopar.runtime.interpreter import PlayerMaker, ProgramPlayer, Shards
from autopar.runtime.peers import PeerGroups
from autopar.runtime.strides import same_strides, with_strides

_LOG = logging.getLogger(__name__)


def compiler(
    otherwise: PlayerMaker,
    coordinates: tuple[int, ...],
    groups: Sequence[tuple[str, int]],
    parameters: Collection[str],
    device: torch.device,
    peers: PeerGroups | None = None,
    copies_if: Callable[[int], bool] = lambda _: True,
    gradients: Collection[str] = (),
    choose: Choose | None = None,
) -> PlayerMaker:
    """Makes players for the rank at these coordinates. otherwise: for programs that cannot be
    traced, and those that need not be compiled, as they do nothing. peers: for collectives by
    copies (`compile.peers`), in programs of which `copies_if` says so, from how many operators
    they have. gradients: outputs that may come in a narrower type, in other strides, and with an
    addend. choose: of kernels for products; by default the heuristic's."""

    def make(program: LocalProgram) -> ProgramPlayer:
        if not program.body or not is_traceable(program):
            return otherwise(program)
        return CompiledProgram(
            program,
            coordinates=coordinates,
            groups=groups,
            device=device,
            parameters=parameters,
            peers=peers,
            copies_if=copies_if,
            gradients=gradients,
            choose=choose,
        )

    return make


class CompiledProgram:
    """Compiled for tensors like those of its first call: the strides that one program leaves are
    those that the next one is compiled for. Pre: trace.is_traceable(program)."""

    lends = False

    def __init__(
        self,
        program: LocalProgram,
        *,
        coordinates: tuple[int, ...],
        groups: Sequence[tuple[str, int]],
        device: torch.device,
        parameters: Collection[str] = (),
        peers: PeerGroups | None = None,
        copies_if: Callable[[int], bool] = lambda _: True,
        gradients: Collection[str] = (),
        choose: Choose | None = None,
    ) -> None:
        """groups: name and size of each mesh axis's process group. parameters: inputs that are
        there before the step: what depends on them alone may start first. peers: among its groups
        those whose collectives may be copies. gradients, choose: as in `compiler`."""
        self._program, self._coordinates, self._groups = program, coordinates, tuple(groups)
        self._constants = [t.to(device) for t in program.constants.values()]
        self._parameters, self._gradients = frozenset(parameters), frozenset(gradients)
        self._peers, self._copies_if, self._choose = peers, copies_if, choose
        self._wanted = Exchange()
        self._places: list[Tensor] | None = None  # allocated when all ranks are about to play
        self._compiled: CompiledModule | None = None
        self._foreseen = False  # compiled for values that were not there yet
        self.num_operators = 0  # of the compiled graph
        self.addends: Mapping[str, Tensor] = {}
        self._strides: list[tuple[int, ...]] = []

    def prepare(self, examples: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
        """Compiles ahead of the first call."""
        values = [examples[key] for key in self._program.inputs]
        constants = [mode.from_tensor(constant) for constant in self._constants]
        values += constants
        compiled = self._compiled
        if compiled is None or not self._fits(values):  # an evaluation may have come before
            compiled, self._foreseen = self._compile(values), True
        results = zip(self._program.outputs, compiled.results, strict=True)
        return {key: result.fake(mode) for key, result in results}

    def __call__(self, inputs: MutableMapping[str, Shards]) -> dict[str, Shards]:
        values = [inputs.pop(key)[0] for key in self._program.inputs]
        inputs.clear()
        values += self._constants
        compiled = self._compiled
        if compiled is None or (self._foreseen and not self._fits(values)):
            compiled = self._compile(values)
        self._foreseen = False
        values = [with_strides(v, s) for v, s in zip(values, self._strides, strict=True)]
        values += self._allocated(compiled)
        outputs = compiled.call(values)  # which empties it: what nobody else holds can be freed
        return {key: [value] for key, value in zip(self._program.outputs, outputs, strict=True)}

    def _allocated(self, compiled: CompiledModule) -> list[Tensor]:
        """Where other ranks write; what is an addend there gets the form of its result."""
        if self._places is None:
            wanted = self._wanted
            places = self._peers.allocate(wanted.places, wanted.numbers) if self._peers else []
            names = list(self._program.outputs)
            self.addends = {
                names[i]: places[addend.place][: addend.numel].view(compiled.results[i].shape)
                for i, addend in wanted.addends.items()
            }
            self._places = places
        return self._places

    def _fits(self, values: Sequence[Tensor]) -> bool:
        return all(same_strides(v, s) for v, s in zip(values, self._strides, strict=True))

    def _compile(self, values: Sequence[Tensor]) -> CompiledModule:
        started = time.monotonic()
        self._strides = [value.stride() for value in values]
        module = trace(self._program, values, coordinates=self._coordinates, groups=self._groups)
        early = [i for i, key in enumerate(self._program.inputs) if key in self._parameters]
        narrow = [i for i, key in enumerate(self._program.outputs) if key in self._gradients]
        ordered = prepare(module, early, narrow)
        self.num_operators = sum(n.op == "call_function" for n in ordered.graph.nodes)
        self._wanted, self._places, self.addends = Exchange(), None, {}
        if self._peers is not None and self._peers.agree(self._copies_if(self.num_operators)):
            peers = self._peers.peers
            ordered, self._wanted = copy_between_peers(ordered, peers, early, narrow)
        if self._choose is not None:
            ordered = choose_kernels(ordered, self._choose)
        self._compiled = compile_module(ordered)
        seconds = time.monotonic() - started
        _LOG.info("compiled %d operators in %.1f s", self.num_operators, seconds)
        return self._compiled
