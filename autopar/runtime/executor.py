"""Plays the steps of one stage for the ranks of it that this process plays.

A step is a row of tasks: fetch (borrowed parameters, then `gather`), the actions of the schedule's
row, reduce among them. `StagePlayer` plays them one by one, so that one loop can drive a single
stage in a real job and another all stages in one process.

    loss       mean over microbatches
    gradient   sum over microbatches of the gradients of loss / num_microbatches: accumulated
               locally with sums over ranks pending, reduced once, then summed over the uses of
               tied weights
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from autopar.errors import InternalError, PlanError
from autopar.graph.program import Graph, GraphInput, InputKind
from autopar.lowering.lower import LOSS, LoweredPlan, LoweredStage
from autopar.lowering.program import LocalProgram
from autopar.ops.random import seed_tensor
from autopar.runtime.accumulate import Accumulator, own_copies
from autopar.runtime.host import to_host, wait_for_copies
from autopar.runtime.inputs import BatchFeed
from autopar.runtime.interpreter import Collectives, InterpretedProgram, ProgramPlayer, Shards
from autopar.runtime.routes import Route, StageRoutes, Transport, stage_routes
from autopar.schedule import Action, ActionKind


class Mode(StrEnum):
    """train: forward, backward, reduce. evaluate: the forward programs only."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one step of a stage starts from.

    parameters: owned ones at rest, on the device or its host, by the name of the input that holds
    them. buffers: by input
    name. seed: of the step.
    """

    parameters: Mapping[str, Shards]
    buffers: Mapping[str, Shards]
    feed: BatchFeed
    seed: int


@dataclass(frozen=True, slots=True)
class StageResult:
    """loss: None on stages that do not make it. gradients: of owned parameters, at rest and where
    these rest, by the name of the input that holds them. buffers: those after the step, by input
    name."""

    loss: Shards | None
    gradients: Mapping[str, Shards]
    buffers: Mapping[str, Shards]


class StageExecutor:
    """The programs of one stage, ready to run. ranks: of the stage's mesh, those played here."""

    def __init__(
        self,
        lowered: LoweredPlan,
        graph: Graph,
        stage: int,
        *,
        ranks: Sequence[int],
        collectives: Collectives,
        transport: Transport,
        device: torch.device,
    ) -> None:
        self.stage: LoweredStage = lowered.stages[stage]
        self.routes: StageRoutes = stage_routes(lowered, stage)
        self.actions = lowered.schedule.actions[stage]
        self.num_microbatches = lowered.schedule.num_microbatches
        self.coordinates = tuple(self.stage.mesh.coordinates(rank) for rank in ranks)
        self.transport = transport
        self.device = device
        self.kinds: Mapping[str, GraphInput] = {i.name: i for i in graph.inputs}

        def player(program: LocalProgram) -> ProgramPlayer:
            return InterpretedProgram(
                program, coordinates=self.coordinates, collectives=collectives, device=device
            )

        self.forward = player(self.stage.forward)
        self.backward = player(self.stage.backward)
        self.gather = player(self.stage.gather)
        self.reduce = player(self.stage.reduce)
        self.on_host = frozenset(p.name for p in self.stage.parameters if p.host)
        self.backward_saves = tuple(k for k in self.stage.saved if k in self.stage.backward.inputs)
        self.backward_buffers = tuple(
            k for k in self.stage.backward.inputs if k in self.stage.buffers
        )
        _check_buffers(lowered, graph)

    def start(self, inputs: StepInputs, mode: Mode = Mode.TRAIN) -> StagePlayer:
        """A step, before its first task."""
        return StagePlayer(self, inputs, mode)


def _check_buffers(lowered: LoweredPlan, graph: Graph) -> None:
    """What one stage updates no other stage may read: it would see old values."""
    owners = {i.name: i.owner or i.target for i in graph.inputs_of(InputKind.BUFFER)}
    updated = {
        owners[name]: stage.index
        for stage in lowered.stages
        for name in stage.forward.outputs
        if name in owners
    }
    for stage in lowered.stages:
        for name, path in stage.buffers.items():
            writer = updated.get(owners[name], stage.index)
            if writer != stage.index:
                raise PlanError(
                    f"buffer {path!r} is updated by stage {writer} and read by stage "
                    f"{stage.index}: plan again with the layers that use it in one stage"
                )


@dataclass(slots=True)
class _State:
    """What a step holds between tasks."""

    parameters: dict[str, Shards] = field(default_factory=dict)  # in the layout held in the step
    buffers: dict[str, Shards] = field(default_factory=dict)
    kept: dict[int, dict[str, Shards]] = field(default_factory=dict)  # microbatch -> for backward
    loss: Shards | None = None
    gradients: dict[str, Shards] = field(default_factory=dict)


class StagePlayer:
    """One step of one stage. `needs` says what the next task receives; `advance` plays it."""

    def __init__(self, executor: StageExecutor, inputs: StepInputs, mode: Mode) -> None:
        self._executor = executor
        self._inputs = inputs
        self._state = _State(buffers=dict(inputs.buffers))
        self._accumulator = Accumulator()
        self._train = mode is Mode.TRAIN
        actions: list[Action | None] = [None]  # None: fetch
        actions += [a for a in executor.actions if self._train or a.kind is ActionKind.FORWARD]
        self._actions = tuple(actions)
        self._position = 0

    @property
    def done(self) -> bool:
        return self._position == len(self._actions)

    @property
    def next_task(self) -> str:
        action = self._actions[self._position]
        return "fetch" if action is None else str(action)

    def needs(self) -> Route:
        """Transfers that the next task receives."""
        routes, action = self._executor.routes, self._actions[self._position]
        if action is None:
            return routes.fetch_in
        return {
            ActionKind.FORWARD: routes.forward_in,
            ActionKind.BACKWARD: routes.backward_in,
            ActionKind.REDUCE: routes.return_in,
        }[action.kind]

    def advance(self) -> None:
        """Plays the next task."""
        action = self._actions[self._position]
        with torch.no_grad():
            if action is None:
                self._fetch()
            elif action.microbatch is None:
                self._reduce()
            elif action.kind is ActionKind.FORWARD:
                self._forward(action.microbatch)
            else:
                self._backward(action.microbatch)
        self._position += 1

    def play(self) -> StageResult:
        """Plays all tasks; receives block."""
        while not self.done:
            self.advance()
        return self.result()

    def result(self) -> StageResult:
        if not self.done:
            raise InternalError(f"the step has not ended: next is {self.next_task}")
        return StageResult(self._state.loss, self._state.gradients, self._state.buffers)

    def _fetch(self) -> None:
        """Lends and borrows parameters, then takes each to its layout in the step."""
        routes, stage = self._executor.routes, self._executor.stage
        at_rest, device = dict(self._inputs.parameters), self._executor.device
        lent = {t.source_key: at_rest[t.source_key] for t in routes.fetch_out}
        self._send(routes.fetch_out, {k: [t.to(device) for t in v] for k, v in lent.items()})
        self._receive(routes.fetch_in, at_rest)
        wanted = {key: at_rest[key] for key in stage.gather.inputs}
        del at_rest
        self._state.parameters = self._executor.gather(wanted)
        if self._executor.on_host:
            wait_for_copies(device)  # an optimizer may write them as soon as the step returns

    def _forward(self, microbatch: int) -> None:
        executor, state = self._executor, self._state
        received: dict[str, Shards] = {}
        self._receive(executor.routes.forward_in, received)
        kept = {name: state.buffers[name] for name in executor.backward_buffers}
        values = self._program_inputs(executor.stage.forward, received, microbatch)
        received.clear()
        outputs = executor.forward(values)
        self._send(executor.routes.forward_out, outputs)
        if self._train:
            kept.update((name, outputs[name]) for name in executor.backward_saves)
            state.kept[microbatch] = kept
        for name in executor.stage.buffers:
            if name in outputs:
                state.buffers[name] = outputs[name]
        if LOSS in outputs:
            share = [loss / executor.num_microbatches for loss in outputs[LOSS]]
            total = state.loss
            state.loss = (
                share if total is None else [a + b for a, b in zip(total, share, strict=True)]
            )

    def _backward(self, microbatch: int) -> None:
        executor = self._executor
        available = self._state.kept.pop(microbatch)
        self._receive(executor.routes.backward_in, available)
        values = self._program_inputs(executor.stage.backward, available, microbatch)
        available.clear()
        outputs = executor.backward(values)
        self._send(executor.routes.backward_out, outputs)
        last = not self._state.kept and executor.num_microbatches == 1
        self._accumulator.add(outputs, executor.stage.gradients, reused=not last)

    def _reduce(self) -> None:
        """Gradients to the layout at rest; uses of one weight summed; borrowed ones given back."""
        executor, state = self._executor, self._state
        state.parameters.clear()
        reduced = executor.reduce(self._accumulator.take())
        sources = {p.name: p.source for p in executor.stage.parameters}
        at_rest: dict[str, Shards] = {}
        for name in executor.stage.gradients:
            _add(at_rest, sources[name], reduced.pop(name))
        self._send(executor.routes.return_out, at_rest)
        for transfer, value in zip(
            executor.routes.return_in,
            executor.transport.receive(executor.routes.return_in),
            strict=True,
        ):
            _add(at_rest, transfer.target_key, value)
        owned = {p.source for p in executor.stage.parameters if p.owned}
        state.gradients = own_copies({n: value for n, value in at_rest.items() if n in owned})
        self._take_to_host(state.gradients)

    def _take_to_host(self, gradients: dict[str, Shards]) -> None:
        """Those of parameters that rest there."""
        device = self._executor.device
        for name in self._executor.on_host & gradients.keys():
            gradients[name] = [to_host(shard, device) for shard in gradients[name]]
        if self._executor.on_host:
            wait_for_copies(device)

    def _send(self, route: Route, values: Mapping[str, Shards]) -> None:
        if route:
            self._executor.transport.send(route, [values[t.source_key] for t in route])

    def _receive(self, route: Route, into: MutableMapping[str, Shards]) -> None:
        if route:
            values = self._executor.transport.receive(route)
            into.update((t.target_key, v) for t, v in zip(route, values, strict=True))

    def _program_inputs(
        self, program: LocalProgram, available: Mapping[str, Shards], microbatch: int
    ) -> dict[str, Shards]:
        """Every input of a program; values made by programs are in `available`."""
        executor, state = self._executor, self._state
        mesh, device = executor.stage.mesh, executor.device
        values: dict[str, Shards] = {}
        for key, port in program.inputs.items():
            known = executor.kinds.get(key)
            if key in available:
                values[key] = available[key]
            elif known is None:
                raise InternalError(f"nothing provides {key!r} to stage {executor.stage.index}")
            elif known.kind is InputKind.PARAMETER:
                values[key] = state.parameters[key]
            elif known.kind is InputKind.BUFFER:
                values[key] = state.buffers[key]
            elif known.kind is InputKind.BATCH:
                values[key] = [
                    self._inputs.feed.part(key, port, mesh, coords, microbatch).to(
                        device, non_blocking=True
                    )
                    for coords in executor.coordinates
                ]
            else:
                values[key] = [self._scalar(known, microbatch)] * len(executor.coordinates)
        return values

    def _scalar(self, known: GraphInput, microbatch: int) -> Tensor:
        """The gradient of the loss, or the seed."""
        meta, device = known.meta, self._executor.device
        if known.kind is InputKind.SEED:
            return seed_tensor(self._inputs.seed, microbatch, device)
        if known.kind is InputKind.TANGENT:
            share = 1.0 / self._executor.num_microbatches
            return torch.full(meta.shape, share, dtype=meta.dtype, device=device)
        raise InternalError(f"input {known.name!r} of kind {known.kind} has no value")


def _add(totals: dict[str, Shards], name: str, value: Shards) -> None:
    """totals[name] += value, out of place: either may be shared."""
    if name in totals:
        totals[name] = [a + b for a, b in zip(totals[name], value, strict=True)]
    else:
        totals[name] = value
