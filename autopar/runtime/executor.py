"""Plays the steps of the stages of one worker, for the ranks of it that this process plays.

A step is a row of tasks: fetch of each stage (borrowed parameters, then `gather`), then the actions
of the schedule's row, reduce among them. `RowPlayer` plays them one by one, so that one loop can
drive a single worker in a real job and another all of them in one process.

    loss       mean over microbatches
    gradient   sum over microbatches of the gradients of loss / num_microbatches: accumulated
               locally with sums over ranks pending, reduced once, then summed over the uses of
               tied weights
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from autopar.actions import Action, ActionKind
from autopar.errors import InternalError, PlanError
from autopar.graph.program import Graph, GraphInput, InputKind
from autopar.layout import local_shape
from autopar.lowering.lower import LOSS, LoweredPlan, LoweredStage
from autopar.lowering.program import LocalProgram, Port
from autopar.ops.random import seed_tensor
from autopar.runtime.accumulate import Accumulator, own_copies, own_results, storages
from autopar.runtime.host import to_host, wait_for_copies
from autopar.runtime.inputs import BatchFeed
from autopar.runtime.interpreter import PlayerMaker, ProgramPlayer, Shards
from autopar.runtime.routes import Route, StageRoutes, Transport, stage_routes

_GRADIENTS_OF = (ActionKind.BACKWARD, ActionKind.WEIGHT)  # actions that may make gradients


class Mode(StrEnum):
    """train: forward, backward, reduce. evaluate: the forward programs only."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one step of a stage starts from.

    parameters: owned ones at rest, on the device or its host, by the name of the input that holds
    them. buffers: by input name. seed: of the step.
    """

    parameters: Mapping[str, Shards]
    buffers: Mapping[str, Shards]
    feed: BatchFeed
    seed: int


@dataclass(frozen=True, slots=True)
class StageResult:
    """loss: None on stages that do not make it. gradients: of owned parameters, at rest and where
    these rest, by the name of the input that holds them. buffers: those after the step, by input
    name. lent: whether the next step overwrites the gradients. addends: what is still to be added
    to some of them, which it does overwrite, by the same names."""

    loss: Shards | None
    gradients: Mapping[str, Shards]
    buffers: Mapping[str, Shards]
    lent: bool = False
    addends: Mapping[str, Tensor] = field(default_factory=dict)


class StageExecutor:
    """The programs of one stage, ready to run. ranks: of the stage's mesh, those played here."""

    def __init__(
        self,
        lowered: LoweredPlan,
        graph: Graph,
        stage: int,
        *,
        ranks: Sequence[int],
        players: PlayerMaker,
        transport: Transport,
        device: torch.device,
        whole: LocalProgram | None = None,
        play_whole: PlayerMaker | None = None,
    ) -> None:
        """players: makes what plays each program. whole: the step as one program, in place of the
        others when it trains (`compile.step`); play_whole: makes what plays it, by default
        players."""
        self.stage: LoweredStage = lowered.stages[stage]
        self.routes: StageRoutes = stage_routes(lowered, stage)
        self.num_microbatches = lowered.schedule.num_microbatches
        self.coordinates = tuple(self.stage.mesh.coordinates(rank) for rank in ranks)
        self.transport = transport
        self.device = device
        self.kinds: Mapping[str, GraphInput] = {i.name: i for i in graph.inputs}

        self.forward = players(self.stage.forward)
        self.backward = players(self.stage.backward)
        self.weights = None if self.stage.weights is None else players(self.stage.weights)
        self.gather = players(self.stage.gather)
        self.reduce = players(self.stage.reduce)
        self.whole_program = whole
        self.whole = None if whole is None else (play_whole or players)(whole)
        self.on_host = frozenset(p.name for p in self.stage.parameters if p.host)
        later = [name for p in self.stage.microbatch_programs[1:] for name in p.inputs]
        self.late_buffers = tuple(k for k in dict.fromkeys(later) if k in self.stage.buffers)
        _check_buffers(lowered, graph)

    def training_programs(self) -> list[tuple[LocalProgram, ProgramPlayer]]:
        """What a step plays that trains, in the order of their first plays."""
        if self.whole is not None and self.whole_program is not None:
            return [(self.whole_program, self.whole)]
        stage = self.stage
        pairs = [(stage.gather, self.gather), (stage.forward, self.forward)]
        pairs.append((stage.backward, self.backward))
        if stage.weights is not None and self.weights is not None:
            pairs.append((stage.weights, self.weights))
        return [*pairs, (stage.reduce, self.reduce)]


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
    held: dict[int, dict[str, Shards]] = field(default_factory=dict)  # microbatch -> for weights
    loss: Shards | None = None
    gradients: dict[str, Shards] = field(default_factory=dict)
    lent: bool = False  # whether the next step overwrites the gradients
    addends: Mapping[str, Tensor] = field(default_factory=dict)


class StagePlayer:
    """One step of one stage. None stands for the fetch, before all actions."""

    def __init__(self, executor: StageExecutor, inputs: StepInputs, mode: Mode) -> None:
        self._executor = executor
        self._inputs = inputs
        self._state = _State(buffers=dict(inputs.buffers))
        self._accumulators = {kind: Accumulator() for kind in _GRADIENTS_OF}
        self._train = mode is Mode.TRAIN

    @property
    def is_whole(self) -> bool:
        """Whether the fetch is followed by nothing: it is the step."""
        return self._train and self._executor.whole is not None

    def needs(self, action: Action | None) -> Route:
        """Transfers that the action receives."""
        routes = self._executor.routes
        if action is None:
            return routes.fetch_in
        return {
            ActionKind.FORWARD: routes.forward_in,
            ActionKind.BACKWARD: routes.backward_in,
            ActionKind.WEIGHT: (),
            ActionKind.REDUCE: routes.return_in,
        }[action.kind]

    def play(self, action: Action | None) -> None:
        """Pre: actions come in the order of the schedule."""
        with torch.no_grad():
            if action is None and self.is_whole:
                self._whole()
            elif action is None:
                self._fetch()
            elif action.microbatch is None:
                self._reduce(action)
            elif action.kind is ActionKind.FORWARD:
                self._forward(action, action.microbatch)
            elif action.kind is ActionKind.BACKWARD:
                self._backward(action, action.microbatch)
            else:
                self._weights(action.microbatch)

    def prepare(self) -> None:
        """Readies what a training step plays: compiled programs are compiled, on each rank without
        waiting for values of another."""
        executor = self._executor
        mode = FakeTensorMode()
        # by name: what came last before the program at hand
        known: dict[str, Tensor] = {
            name: mode.from_tensor(shards[0].detach())
            for values in (self._inputs.parameters, self._inputs.buffers)
            for name, shards in values.items()
        }
        for program, player in executor.training_programs():
            examples = {
                key: known[key] if key in known else self._example(key, port, mode)
                for key, port in program.inputs.items()
            }
            made = player.prepare(examples, mode)
            known |= {k: made.get(k, self._contiguous(p, mode)) for k, p in program.outputs.items()}

    def _example(self, key: str, port: Port, mode: FakeTensorMode) -> Tensor:
        """Like an input that no program of the stage makes: it is received, or given."""
        known = self._executor.kinds.get(key)
        if known is None or known.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return self._contiguous(port, mode)
        return mode.from_tensor(self._given(known, port, 0)[0])

    def _contiguous(self, port: Port, mode: FakeTensorMode) -> Tensor:
        sizes, device = self._executor.stage.mesh.axis_sizes, self._executor.device
        with mode:
            shape = local_shape(port.dims, port.layout, sizes)
            return torch.empty(shape, dtype=port.meta.dtype, device=device)

    def result(self) -> StageResult:
        state = self._state
        return StageResult(
            state.loss, state.gradients, state.buffers, lent=state.lent, addends=state.addends
        )

    def _whole(self) -> None:
        """The step as one program, from parameters at rest to their gradients."""
        executor, state = self._executor, self._state
        assert executor.whole is not None and executor.whole_program is not None
        state.parameters = dict(self._inputs.parameters)
        outputs = executor.whole(self._program_inputs(executor.whole_program, {}, 0))
        state.lent = executor.whole.lends
        state.loss = [t.clone() if state.lent else t for t in outputs.pop(LOSS)]
        state.buffers.update({name: outputs.pop(name) for name in state.buffers if name in outputs})
        state.addends = executor.whole.addends
        if state.lent:
            state.gradients = outputs
            return
        state.gradients = own_results(outputs, state.addends)

    def _fetch(self) -> None:
        """Lends and borrows parameters, then takes each to its layout in the step."""
        routes, stage = self._executor.routes, self._executor.stage
        at_rest, device = dict(self._inputs.parameters), self._executor.device
        lent = {t.source_key: at_rest[t.source_key] for t in routes.fetch_out}
        self._send(routes.fetch_out, {k: [t.to(device) for t in v] for k, v in lent.items()}, None)
        self._receive(routes.fetch_in, at_rest, None)
        wanted = {key: at_rest[key] for key in stage.gather.inputs}
        del at_rest
        self._state.parameters = self._executor.gather(wanted)
        if self._executor.on_host:
            wait_for_copies(device)  # an optimizer may write them as soon as the step returns

    def _forward(self, action: Action, microbatch: int) -> None:
        executor, state = self._executor, self._state
        received: dict[str, Shards] = {}
        self._receive(executor.routes.forward_in, received, action)
        kept = {name: state.buffers[name] for name in executor.late_buffers}
        values = self._program_inputs(executor.stage.forward, received, microbatch)
        received.clear()
        outputs = executor.forward(values)
        self._send(executor.routes.forward_out, outputs, action)
        if self._train:
            kept.update((name, outputs[name]) for name in executor.stage.saved)
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

    def _backward(self, action: Action, microbatch: int) -> None:
        executor, weights = self._executor, self._executor.stage.weights
        available = self._state.kept.pop(microbatch)
        self._receive(executor.routes.backward_in, available, action)
        held = _only(available, () if weights is None else weights.inputs)
        values = self._program_inputs(executor.stage.backward, available, microbatch)
        available.clear()
        outputs = executor.backward(values)
        self._send(executor.routes.backward_out, outputs, action)
        self._accumulate(ActionKind.BACKWARD, outputs, storages(held))
        if weights is not None:
            self._state.held[microbatch] = held | _only(outputs, weights.inputs)

    def _weights(self, microbatch: int) -> None:
        executor = self._executor
        if executor.stage.weights is None or executor.weights is None:
            raise InternalError(f"stage {executor.stage.index} plays all of backward in B")
        available = self._state.held.pop(microbatch)
        shared = storages(available)  # some of it may still be on its way to another stage
        values = self._program_inputs(executor.stage.weights, available, microbatch)
        available.clear()
        self._accumulate(ActionKind.WEIGHT, executor.weights(values), shared)

    def _accumulate(
        self, kind: ActionKind, outputs: Mapping[str, Shards], shared: Collection[int]
    ) -> None:
        """Adds the gradients among what a program made. shared: memory of values of others."""
        names = [name for name in self._executor.stage.gradients if name in outputs]
        reused = self._executor.num_microbatches > 1
        self._accumulators[kind].add(outputs, names, reused=reused, shared=shared)

    def _reduce(self, action: Action) -> None:
        """Gradients to the layout at rest; uses of one weight summed; borrowed ones given back."""
        executor, state = self._executor, self._state
        state.parameters.clear()
        sums = {k: v for a in self._accumulators.values() for k, v in a.take().items()}
        reduced = executor.reduce(sums)
        sources = {p.name: p.source for p in executor.stage.parameters}
        at_rest: dict[str, Shards] = {}
        for name in executor.stage.gradients:
            _add(at_rest, sources[name], reduced.pop(name))
        self._send(executor.routes.return_out, at_rest, action)
        for transfer, value in zip(
            executor.routes.return_in,
            executor.transport.receive(executor.routes.return_in, action),
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

    def _send(self, route: Route, values: Mapping[str, Shards], action: Action | None) -> None:
        if route:
            self._executor.transport.send(route, [values[t.source_key] for t in route], action)

    def _receive(
        self, route: Route, into: MutableMapping[str, Shards], action: Action | None
    ) -> None:
        if route:
            values = self._executor.transport.receive(route, action)
            into.update((t.target_key, v) for t, v in zip(route, values, strict=True))

    def _program_inputs(
        self, program: LocalProgram, available: Mapping[str, Shards], microbatch: int
    ) -> dict[str, Shards]:
        """Every input of a program; values made by programs are in `available`."""
        executor, state = self._executor, self._state
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
            else:
                values[key] = self._given(known, port, microbatch)
        return values

    def _given(self, known: GraphInput, port: Port, microbatch: int) -> Shards:
        """An input that comes with the step."""
        executor = self._executor
        if known.kind is not InputKind.BATCH:
            return [self._scalar(known, microbatch)] * len(executor.coordinates)
        mesh, part = executor.stage.mesh, self._inputs.feed.part
        parts = [part(known.name, port, mesh, c, microbatch) for c in executor.coordinates]
        return [shard.to(executor.device, non_blocking=True) for shard in parts]

    def _scalar(self, known: GraphInput, microbatch: int) -> Tensor:
        """The gradient of the loss, or the seed."""
        meta, device = known.meta, self._executor.device
        if known.kind is InputKind.SEED:
            return seed_tensor(self._inputs.seed, microbatch, device)
        if known.kind is InputKind.TANGENT:
            share = 1.0 / self._executor.num_microbatches
            return torch.full(meta.shape, share, dtype=meta.dtype, device=device)
        raise InternalError(f"input {known.name!r} of kind {known.kind} has no value")


class RowPlayer:
    """One step of one worker. `needs` says what the next task receives; `advance` plays it."""

    def __init__(
        self,
        row: Sequence[Action],
        executors: Mapping[int, StageExecutor],
        inputs: Mapping[int, StepInputs],
        mode: Mode = Mode.TRAIN,
    ) -> None:
        """executors, inputs: by stage, of all stages of the row."""
        self._players = {s: StagePlayer(e, inputs[s], mode) for s, e in executors.items()}
        # earlier stages first: they lend
        self._tasks: list[tuple[int, Action | None]] = [(s, None) for s in sorted(executors)]
        self._transport = next(iter(executors.values())).transport  # of the whole row
        self._trains = train = mode is Mode.TRAIN
        self._tasks += [
            (a.stage, a)
            for a in row
            if (train or a.kind is ActionKind.FORWARD) and not self._players[a.stage].is_whole
        ]
        self._position = 0

    @property
    def done(self) -> bool:
        return self._position == len(self._tasks)

    @property
    def next_task(self) -> str:
        """Such as "stage1 at B0"."""
        stage, action = self._tasks[self._position]
        return f"stage{stage} at {'fetch' if action is None else action}"

    def needs(self) -> Route:
        """Transfers that the next task receives."""
        stage, action = self._tasks[self._position]
        return self._players[stage].needs(action)

    def advance(self) -> None:
        """Plays the next task."""
        stage, action = self._tasks[self._position]
        self._players[stage].play(action)
        self._position += 1

    def prepare(self) -> None:
        """Before the first task of the first step that trains."""
        for player in self._players.values():
            player.prepare()

    def play(self) -> dict[int, StageResult]:
        """Plays all tasks; receives block."""
        self._transport.begin(trains=self._trains)
        while not self.done:
            self.advance()
        return self.results()

    def results(self) -> dict[int, StageResult]:
        """By stage."""
        if not self.done:
            raise InternalError(f"the step has not ended: next is {self.next_task}")
        return {stage: player.result() for stage, player in self._players.items()}


def _only(values: Mapping[str, Shards], names: Collection[str]) -> dict[str, Shards]:
    return {name: value for name, value in values.items() if name in names}


def _add(totals: dict[str, Shards], name: str, value: Shards) -> None:
    """totals[name] += value, out of place: either may be shared."""
    if name in totals:
        totals[name] = [a + b for a, b in zip(totals[name], value, strict=True)]
    else:
        totals[name] = value
