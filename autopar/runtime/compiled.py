"""Plays a local program as compiled code, for the one rank of a real job."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, MutableMapping, Sequence

import torch
from torch import Tensor

from autopar.compile.inductor import Compiled, compile_module
from autopar.compile.passes import prepare
from autopar.compile.trace import is_traceable, trace
from autopar.lowering.program import LocalProgram
from autopar.runtime.interpreter import PlayerMaker, ProgramPlayer, Shards
from autopar.runtime.strides import with_strides

_LOG = logging.getLogger(__name__)


def compiler(
    otherwise: PlayerMaker,
    coordinates: tuple[int, ...],
    groups: Sequence[tuple[str, int]],
    parameters: Collection[str],
    device: torch.device,
) -> PlayerMaker:
    """Makes players for the rank at these coordinates. otherwise: for programs that cannot be
    traced, and those that need not be compiled, as they do nothing."""

    def make(program: LocalProgram) -> ProgramPlayer:
        if not program.body or not is_traceable(program):
            return otherwise(program)
        return CompiledProgram(
            program,
            coordinates=coordinates,
            groups=groups,
            device=device,
            parameters=parameters,
        )

    return make


class CompiledProgram:
    """Compiled at its first call, for tensors like those of that call: the strides that one program
    leaves are those that the next one is compiled for. Pre: trace.is_traceable(program)."""

    def __init__(
        self,
        program: LocalProgram,
        *,
        coordinates: tuple[int, ...],
        groups: Sequence[tuple[str, int]],
        device: torch.device,
        parameters: Collection[str] = (),
    ) -> None:
        """groups: name and size of each mesh axis's process group. parameters: inputs that are
        there before the step: what depends on them alone may start first."""
        self._program, self._coordinates, self._groups = program, coordinates, tuple(groups)
        self._constants = [t.to(device) for t in program.constants.values()]
        self._parameters = frozenset(parameters)
        self._call: Compiled | None = None
        self.num_operators = 0  # of the compiled graph
        self._strides: list[tuple[int, ...]] = []

    def __call__(self, inputs: MutableMapping[str, Shards]) -> dict[str, Shards]:
        values = [inputs.pop(key)[0] for key in self._program.inputs]
        inputs.clear()
        values += self._constants
        if self._call is None:
            self._compile(values)
            assert self._call is not None
        else:
            values = [with_strides(v, s) for v, s in zip(values, self._strides, strict=True)]
        outputs = self._call(values)
        return {key: [value] for key, value in zip(self._program.outputs, outputs, strict=True)}

    def _compile(self, values: Sequence[Tensor]) -> None:
        started = time.monotonic()
        self._strides = [value.stride() for value in values]
        module = trace(self._program, values, coordinates=self._coordinates, groups=self._groups)
        early = [i for i, key in enumerate(self._program.inputs) if key in self._parameters]
        ordered = prepare(module, early)
        self._call = compile_module(ordered)
        self.num_operators = sum(n.op == "call_function" for n in ordered.graph.nodes)
        seconds = time.monotonic() - started
        _LOG.info("compiled %d operators in %.1f s", self.num_operators, seconds)
