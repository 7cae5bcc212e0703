"""The virtual run: all stages and ranks of a plan in one process, without a process group.

Workers take turns, one action at a time, each playing its ranks in lockstep; values between stages
go through mailboxes. The programs, the executor and the order of actions are those of a real job.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopar.actions import Action
from autopar.compile.step import whole_step
from autopar.errors import InternalError, ScheduleError
from autopar.graph.program import Graph, InputKind
from autopar.lowering.lower import LoweredPlan, LoweredStage, StageParameter
from autopar.lowering.transfer import Transfer
from autopar.runtime.executor import Mode, RowPlayer, StageExecutor, StageResult, StepInputs
from autopar.runtime.host import HOST
from autopar.runtime.inputs import local_part, valid_part, whole_feed
from autopar.runtime.interpreter import Shards, interpreter
from autopar.runtime.routes import Route, box_of, cut_tile, join_tiles
from autopar.runtime.traced import tracer
from autopar.runtime.virtual import VirtualCollectives, unshard

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Whole tensors. gradients: by owner name; buffers: by path in the model."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


class Mailboxes:
    """A transport between stages of which this process plays all ranks."""

    def __init__(self, stages: Sequence[LoweredStage], device: torch.device) -> None:
        self._stages = stages
        self._device = device
        self._boxes: dict[tuple[int, int, str], deque[Shards]] = defaultdict(deque)

    def begin(self, *, trains: bool) -> None:
        del trains

    def send(self, transfers: Route, values: Sequence[Shards], action: Action | None) -> None:
        del action
        for transfer, shards in zip(transfers, values, strict=True):
            mesh = self._stages[transfer.source_stage].mesh
            tiles = [cut_tile(shards[t.source], transfer, mesh, t) for t in transfer.tiles]
            self._boxes[box_of(transfer)].append(tiles)

    def receive(self, transfers: Route, action: Action | None) -> list[Shards]:
        del action
        return [self._receive(transfer) for transfer in transfers]

    def ready(self, transfers: Route) -> bool:
        return all(self._boxes[box_of(transfer)] for transfer in transfers)

    def empty(self) -> bool:
        return not any(self._boxes.values())

    def _receive(self, transfer: Transfer) -> Shards:
        tiles = self._boxes[box_of(transfer)].popleft()
        mesh = self._stages[transfer.target_stage].mesh
        shards = []
        for rank in range(mesh.num_devices):
            mine = [p for p in zip(transfer.tiles, tiles, strict=True) if p[0].target == rank]
            shards.append(join_tiles(transfer, mesh, mine, self._device))
        return shards


class VirtualRun:
    """A plan at work on the CPU or on one device. Each rank holds its own shards of the parameters.

    parameters: whole tensors by owner name. buffers: whole tensors by path in the model. traced:
    plays what a compiler is given (`runtime.traced`).
    """

    def __init__(
        self,
        lowered: LoweredPlan,
        graph: Graph,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        device: torch.device | None = None,
        traced: bool = False,
        peer_copies: bool = False,
    ) -> None:
        self._lowered = lowered
        self._traced, self._copies = traced, peer_copies
        self._graph = graph
        self._device = device or torch.device("cpu")
        self._mail = Mailboxes(lowered.stages, self._device)
        self._executors = [self._executor(stage) for stage in lowered.stages]
        self._padded = [self._place(stage, parameters) for stage in lowered.stages]
        self._shards = [
            self._views(stage, padded)
            for stage, padded in zip(lowered.stages, self._padded, strict=True)
        ]
        self._buffers = [
            {
                name: [_copy(buffers[path], self._device) for _ in stage.devices]
                for name, path in stage.buffers.items()
            }
            for stage in lowered.stages
        ]
        self._optimizers: list[torch.optim.Optimizer] = []

    def step(self, leaves: Sequence[Tensor], seed: int) -> StepResult:
        """One training step on a whole global batch, without an update of the parameters; each
        shard's `.grad` is set. leaves: in the order of the graph's BATCH inputs."""
        results = self._play(leaves, seed, Mode.TRAIN)
        gradients = {}
        for stage, shards, result in zip(self._lowered.stages, self._shards, results, strict=True):
            for parameter in owned(stage):
                if parameter.name not in result.gradients:
                    continue
                local = result.gradients[parameter.name]
                for rank, (shard, gradient) in enumerate(
                    zip(shards[parameter.name], local, strict=True)
                ):
                    if shard.requires_grad:
                        shard.grad = _valid(stage, parameter, rank, gradient).clone()
                gradients[parameter.owner] = self._whole(stage, parameter, local)
        self._buffers = [dict(result.buffers) for result in results]
        return StepResult(self._loss(results), gradients, self.buffers())

    def eval_step(self, leaves: Sequence[Tensor], seed: int) -> Tensor:
        """The loss of the forward programs, as captured: dropout, if the graph has any, is on."""
        return self._loss(self._play(leaves, seed, Mode.EVALUATE))

    def parameters(self) -> dict[str, Tensor]:
        """Whole tensors by owner name; InternalError where replicas differ."""
        return {
            parameter.owner: self._whole(stage, parameter, padded[parameter.name])
            for stage, padded in zip(self._lowered.stages, self._padded, strict=True)
            for parameter in owned(stage)
        }

    def buffers(self) -> dict[str, Tensor]:
        """Whole tensors by path; InternalError where ranks differ."""
        whole: dict[str, Tensor] = {}
        for stage, values in zip(self._lowered.stages, self._buffers, strict=True):
            for name, path in stage.buffers.items():
                for value in values[name]:
                    _check_equal(path, whole.setdefault(path, value), value)
        return whole

    def attach(self, make_optimizer: MakeOptimizer) -> None:
        """One optimizer per rank, on that rank's shards."""
        self._optimizers = []
        for stage, shards in zip(self._lowered.stages, self._shards, strict=True):
            for rank in range(len(stage.devices)):
                local = [values[rank] for values in shards.values()]
                if local:
                    self._optimizers.append(make_optimizer(local))

    def scale_gradients(self, factor: float) -> None:
        """Of every shard, in place: what clipping does once it knows the norm."""
        for shards in self._shards:
            for parameter in (p for values in shards.values() for p in values):
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def update(self) -> None:
        """A step of every rank's optimizer; gradients are cleared."""
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _executor(self, stage: LoweredStage) -> StageExecutor:
        ranks = range(stage.mesh.num_devices)
        coordinates = [stage.mesh.coordinates(rank) for rank in ranks]
        players = interpreter(coordinates, VirtualCollectives(stage.mesh), self._device)
        whole = None
        if self._traced:
            names = [p.name for p in stage.parameters]
            players = tracer(stage.mesh, names, self._device, peer_copies=self._copies)
            whole = whole_step(self._lowered, stage.index)
        return StageExecutor(
            self._lowered,
            self._graph,
            stage.index,
            ranks=ranks,
            players=players,
            transport=self._mail,
            device=self._device,
            whole=whole,
        )

    def _place(self, stage: LoweredStage, parameters: Mapping[str, Tensor]) -> dict[str, Shards]:
        """Every rank's shards, padding included."""
        placed = {}
        for p in owned(stage):
            whole = parameters[p.owner].detach()
            coordinates = map(stage.mesh.coordinates, range(stage.mesh.num_devices))
            placed[p.name] = [
                _copy(
                    local_part(whole, p.dims, p.rest, stage.mesh, coords),
                    HOST if p.host else self._device,
                )
                for coords in coordinates
            ]
        return placed

    def _views(
        self, stage: LoweredStage, padded: Mapping[str, Shards]
    ) -> dict[str, list[nn.Parameter]]:
        """The shards as optimizers see them: without their padding."""
        return {
            p.name: [
                nn.Parameter(_valid(stage, p, rank, shard), requires_grad=p.requires_grad)
                for rank, shard in enumerate(padded[p.name])
            ]
            for p in owned(stage)
        }

    def _play(self, leaves: Sequence[Tensor], seed: int, mode: Mode) -> list[StageResult]:
        batch = self._graph.inputs_of(InputKind.BATCH)
        feed = whole_feed(
            {i.name: leaf for i, leaf in zip(batch, leaves, strict=True)},
            {i.name: i.meta for i in batch},
            self._lowered.schedule.num_microbatches,
        )
        schedule = self._lowered.schedule
        inputs = [
            StepInputs(padded, buffers, feed, seed)
            for padded, buffers in zip(self._padded, self._buffers, strict=True)
        ]
        players = []
        for worker, row in enumerate(schedule.actions):
            own = schedule.stages_of(worker)
            executors = {stage: self._executors[stage] for stage in own}
            players.append(RowPlayer(row, executors, {s: inputs[s] for s in own}, mode))
        self._take_turns(players)
        results = {s: result for player in players for s, result in player.results().items()}
        return [results[stage.index] for stage in self._lowered.stages]

    def _take_turns(self, players: Sequence[RowPlayer]) -> None:
        """Each worker plays one task where all that it receives has been sent."""
        while any(not player.done for player in players):
            able = [p for p in players if not p.done and self._mail.ready(p.needs())]
            if not able:
                waits = ", ".join(p.next_task for p in players if not p.done)
                raise ScheduleError(f"deadlock: waiting for values that nobody sends: {waits}")
            for player in able:
                player.advance()
        if not self._mail.empty():
            raise InternalError("values were sent that no stage received")

    def _loss(self, results: Sequence[StageResult]) -> Tensor:
        losses = results[self._lowered.loss_stage].loss
        if losses is None:
            raise InternalError("the loss stage made no loss")
        for loss in losses[1:]:
            _check_equal("the loss", losses[0], loss)
        return losses[0]

    def _whole(self, stage: LoweredStage, parameter: StageParameter, shards: Shards) -> Tensor:
        shards = [s.detach() for s in shards]
        whole = unshard(shards, parameter.dims, parameter.rest, stage.mesh)
        for rank, shard in enumerate(shards):
            coords = stage.mesh.coordinates(rank)
            part = local_part(whole, parameter.dims, parameter.rest, stage.mesh, coords)
            valid = (_valid(stage, parameter, rank, t) for t in (part, shard))
            _check_equal(parameter.owner, *valid)
        return whole


def owned(stage: LoweredStage) -> tuple[StageParameter, ...]:
    """The parameters that a stage keeps between steps, each once."""
    return tuple(p for p in stage.parameters if p.owned and p.source == p.name)


def _valid(stage: LoweredStage, parameter: StageParameter, rank: int, shard: Tensor) -> Tensor:
    """A view of a shard at rest without its padding."""
    mesh = stage.mesh
    return valid_part(shard, parameter.dims, parameter.rest, mesh, mesh.coordinates(rank))


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True).contiguous()


def _check_equal(what: str, one: Tensor, other: Tensor) -> None:
    if not torch.allclose(one, other, rtol=1e-6, atol=1e-12, equal_nan=True):
        raise InternalError(f"replicas of {what} differ")
