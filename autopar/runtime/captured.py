"""Plays a compiled program as one CUDA graph: the host launches it once, not kernel by kernel.

Inputs are copied to where the graph reads them, but for those that stay in one place, such as
parameters. Results are in the graph's own memory: the next step overwrites them, so that whoever
keeps one copies it (`lends`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from autopar.lowering.program import LocalProgram
from autopar.runtime.accumulate import own_results
from autopar.runtime.compiled import CompiledProgram
from autopar.runtime.interpreter import PlayerMaker, ProgramPlayer, Shards

_LOG = logging.getLogger(__name__)

# Plays before the capture: one compiles; in the next kernels are tuned and libraries initialised.
_PLAYS_BEFORE = 2
# Below so many predicted seconds per operator the host may be late: beside busy processors it took
# 21 to 23 us for each of the 7,400 of GPT 1.3B at batch 16 (steps of 158 to 169 ms, where kernels
# take 128), and 12 us for each of GPT-2 124M (52 ms for 31).
LAUNCH_BOUND_S = 25e-6
# Below so many, collectives are too short for copies between ranks: in a graph of GPT-2 124M,
# predicted at 8.1 us per operator, waiting for words made a step slower (36.6 ms for 32.0).
SHORT_S = 12e-6

Results = dict[str, Shards]


@dataclass(frozen=True, slots=True)
class Recording:
    """results: in memory that `replay` fills, each time that it is called. forget: ends it."""

    results: Results
    replay: Callable[[], None]
    forget: Callable[[], None]


def record(play: Callable[[], Results]) -> Recording:
    """What `play` starts on the device, without running it. Raises what `play` raises."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    before, reason = torch.cuda.current_stream(), None
    try:
        # other threads, such as the watchdog of NCCL, may talk to the device meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                results = play()
            except Exception as error:
                reason = error
                raise
    except Exception as error:
        if torch.cuda.current_stream() != before:
            _leave_capture(before, pool)
        raise (reason or error) from None
    return Recording(results, graph.replay, graph.reset)


def _leave_capture(before: torch.cuda.Stream, pool: Any) -> None:
    """What torch leaves out where other streams have not come back to the captured one, such as
    those of copies that nobody has waited for."""
    torch.cuda.set_stream(before)
    torch._C._cuda_endAllocateToPool(before.device_index, pool)
    torch._C._cuda_releasePool(before.device_index, pool)


def capturer(players: PlayerMaker, staying: Collection[str], seconds: float | None) -> PlayerMaker:
    """Makes players that are captured, of programs that `players` compiles."""

    def make(program: LocalProgram) -> ProgramPlayer:
        player = players(program)
        if not isinstance(player, CompiledProgram):
            return player
        return CapturedProgram(player, staying=staying, seconds=seconds)

    return make


class CapturedProgram:
    """A compiled program that becomes a graph at its third play, if that is worth it. Where it
    fails, as for want of memory, the program goes on kernel by kernel: other ranks need not fail
    with it, for all of them start the same collectives either way. Pre: a program that does not
    wait for the host."""

    def __init__(
        self,
        program: CompiledProgram,
        *,
        staying: Collection[str],
        seconds: float | None,
        recorder: Callable[[Callable[[], Results]], Recording] = record,
    ) -> None:
        """staying: inputs that are in the same memory each time. seconds: predicted for the
        program, to decide by; None captures it in any case."""
        self._program, self._record = program, recorder
        self._staying, self._seconds = frozenset(staying), seconds
        self._plays = 0
        self._inputs: dict[str, Tensor] = {}
        self._recording: Recording | None = None

    @property
    def lends(self) -> bool:
        """Once it is captured: they are in the graph's own memory."""
        return self._recording is not None

    @property
    def addends(self) -> Mapping[str, Tensor]:
        return self._program.addends

    def release(self) -> None:
        """Forgets the graph; the program goes on kernel by kernel. NCCL ends no group that a graph
        still uses."""
        if self._recording is not None:
            self._recording.forget()
            self._recording, self._inputs = None, {}

    def prepare(self, examples: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
        return self._program.prepare(examples, mode)

    def __call__(self, inputs: MutableMapping[str, Shards]) -> Results:
        self._plays += 1
        if self._plays == _PLAYS_BEFORE + 1 and self._is_launch_bound():
            self._capture(inputs)
        if self._recording is None:
            return self._program(inputs)
        for key, place in self._inputs.items():
            (value,) = inputs[key]
            if value.data_ptr() != place.data_ptr():
                place.copy_(value, non_blocking=True)
        inputs.clear()
        self._recording.replay()
        return {key: list(shards) for key, shards in self._recording.results.items()}

    def _is_launch_bound(self) -> bool:
        least = LAUNCH_BOUND_S * self._program.num_operators
        return self._seconds is None or self._seconds < least

    def _capture(self, inputs: MutableMapping[str, Shards]) -> None:
        places = {
            key: value if key in self._staying else value.clone()
            for key, (value,) in inputs.items()
        }

        def play() -> Results:
            results = self._program({key: [place] for key, place in places.items()})
            return own_results(results, self._program.addends)

        try:
            recording = self._record(play)
        except Exception as error:
            _LOG.warning(
                "the step runs kernel by kernel, as it could not be captured as a CUDA graph: %s:"
                " %s. Pass cuda_graph=False to leave that out.",
                type(error).__name__,
                (str(error).splitlines() or [""])[0],
            )
            return
        self._inputs, self._recording = places, recording
        weakref.finalize(self, recording.forget)  # at the latest when the interpreter ends
        _LOG.info("captured %d operators as a CUDA graph", self._program.num_operators)
