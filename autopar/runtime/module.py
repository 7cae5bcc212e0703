"""ParallelModel: the model as one rank of a parallel job has it.

A torch.nn.Module with the model's own parameter and buffer names. Parameters are DTensors on the
mesh of the stage that owns them, so that optimizers, torch.distributed.checkpoint and gradient
clipping work on them; a rank has those of its stages only. Those that the plan keeps on the host
are on the CPU, with their gradients, and an optimizer updates them there. A plan for one device
without a process group has plain tensors instead. Inside a step there are only local tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compile.choices import Choose
from autopar.compile.step import whole_step
from autopar.errors import InternalError, OptionError, PlanError
from autopar.graph.program import Graph
from autopar.lowering.lower import LOSS, LoweredPlan, lower_plan
from autopar.plan import ParallelPlan
from autopar.runtime.captured import SHORT_S, CapturedProgram, capturer
from autopar.runtime.choices import FastestKernels
from autopar.runtime.comm import RankComm, World, connect_rank
from autopar.runtime.compiled import compiler
from autopar.runtime.data import DataShard, data_shard
from autopar.runtime.executor import Mode, RowPlayer, StageExecutor, StageResult, StepInputs
from autopar.runtime.inputs import BatchFeed
from autopar.runtime.interpreter import interpreter
from autopar.runtime.parameters import (
    Initialiser,
    KeptParameter,
    kept_buffers,
    kept_parameters,
    model_values,
    tied_names,
)
from autopar.runtime.peers import PeerGroups
from autopar.runtime.resting import RestingParameter, scope_of
from autopar.runtime.simulated import Mailboxes
from autopar.runtime.virtual import VirtualCollectives

_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class ParallelModel(nn.Module):
    """One rank of a plan. See `train_step`, `eval_step`, `clip_grad_norm_`, `data_shard`.

    model: gives names and first values; it is not kept, and may be on meta (see `model_values`).
    graph: captured from it, with layers; plan: made for this graph. world: None for a plan of one
    device. seed: of dropout and of what is initialised here. compiled: whether programs run as
    Inductor's code, compiled at the first step, or operator by operator; by default on GPUs.
    cuda_graph: whether a compiled step that is one program is captured as a CUDA graph; by default
    where a busy host may be late. peer_copies: whether collectives that a compiled step of one
    program makes once are copies between ranks, where these reach each other's memory; by default
    on GPUs, but for graphs of short kernels. tune_products: whether the fastest kernel for each
    large product of compiled programs is found by running those that there are; by default on GPUs.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: ParallelPlan,
        *,
        world: World | None = None,
        device: torch.device | None = None,
        initialiser: Initialiser | None = None,
        seed: int = 0,
        compiled: bool | None = None,
        cuda_graph: bool | None = None,
        peer_copies: bool | None = None,
        tune_products: bool | None = None,
    ) -> None:
        super().__init__()
        if world is None and plan.num_devices != 1:
            raise PlanError(
                f"the plan is for {plan.num_devices} devices, but this is a single process: start "
                f"it with torchrun --nproc-per-node {plan.num_devices}, or plan for one device"
            )
        if world is not None:
            world.check_size(plan.num_devices)
        self._plan = plan
        self._world = world
        self._device = world.device if world is not None else device or torch.device("cpu")
        self._lowered: LoweredPlan = lower_plan(graph, plan)
        self._comm = None if world is None else connect_rank(world, self._lowered)
        self._rank = 0 if self._comm is None else self._comm.rank  # in the meshes of its stages
        own = plan.stages_of(0 if world is None else world.rank)
        self._row = self._lowered.schedule.actions[own[0]]
        self._compiled = self._device.type == "cuda" if compiled is None else compiled
        self._ready = False  # for a step that trains
        self._executors = _make_executors(
            plan,
            self._lowered,
            graph,
            own,
            self._comm,
            self._device,
            compiled=self._compiled,
            cuda_graph=cuda_graph,
            peers=self._peer_groups(own[0], peer_copies),
            choose=self._choose(tune_products),
        )
        for executor in self._executors.values():
            if world is not None and isinstance(executor.whole, CapturedProgram):
                world.release_first(executor.whole)
        stages = [executor.stage for executor in self._executors.values()]
        self._kept_buffers = kept_buffers(model, self._lowered, stages)
        self._known = {name for names in tied_names(model).values() for name in names}
        self._known.update(name for name, _ in model.named_buffers(remove_duplicate=False))
        self._data = data_shard(graph, stages, self._rank, plan.num_microbatches)
        self._seed, self._steps = seed, 0
        values = model_values(model, initialiser, seed)
        kept = kept_parameters(model, self._lowered, stages)
        self._resting = tuple(self._rest(k, values(k.names[0], k.shape)) for k in kept)
        self._fill_buffers(model, values)

    @property
    def plan(self) -> ParallelPlan:
        return self._plan

    @property
    def lowered(self) -> LoweredPlan:
        return self._lowered

    @property
    def data_shard(self) -> DataShard:
        """Which rows of a global batch this rank needs; `.select(batch)` keeps only those."""
        return self._data

    def forward(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise OptionError(
            "a parallel model runs whole steps: call train_step(batch) or eval_step(batch)"
        )

    def train_step(self, batch: Any, seed: int | None = None) -> Tensor:
        """Forward and backward of all microbatches; the loss, their mean, on every rank.

        `.grad` of each parameter is set, or added to, as autograd does. batch: the whole global
        batch, or the rows that `data_shard` selects; BatchError otherwise. seed: of dropout, the
        same on all ranks; by default another one in each step.
        """
        self.compile_ahead(batch)
        seed = self._seed + self._steps if seed is None else seed
        self._steps += 1
        with torch.no_grad(), self._guarded("train_step"):
            for resting in self._resting:
                resting.keep_gradient()
        results, loss = self._play(batch, seed, Mode.TRAIN, "train_step")
        with torch.no_grad():
            for resting in self._resting:
                kept = resting.kept
                result = results[kept.stage]
                if kept.key in result.gradients and kept.requires_grad:
                    resting.add_gradient(
                        result.gradients[kept.key][0],
                        addend=result.addends.get(kept.key),
                        lent=result.lent,
                    )
        for buffer in self._kept_buffers:
            for stage, key in buffer.keys:
                _buffer(self, buffer.name).copy_(results[stage].buffers[key][0])
        return loss

    def compile_ahead(self, batch: Any) -> None:
        """What the first training step would compile, on every rank at once and without running
        it: nothing else happens. batch: like those of the steps. Does nothing where the model runs
        operator by operator, or after a step."""
        if self._compiled and not self._ready:
            player = self._row_player(batch, self._seed, Mode.TRAIN)
            with self._guarded("compile_ahead"):
                player.prepare()
        self._ready = True

    def eval_step(self, batch: Any) -> Tensor:
        """The loss without gradients, by the same forward programs: a model that was captured in
        train mode keeps its dropout (under one fixed seed) and its batch statistics, of which no
        buffer is updated. For a model in eval mode capture and plan it in eval mode."""
        return self._play(batch, self._seed, Mode.EVALUATE, "eval_step")[1]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales all gradients so that their norm over all stages is at most max_norm; returns the
        norm before. Replicas and tied weights count once."""
        norm_type = float(norm_type)
        gradients = [(r, g) for r in self._resting if (g := r.gradient) is not None]
        dtype = torch.promote_types(
            torch.float32, max((g.dtype for _, g in gradients), key=_width, default=torch.float32)
        )
        mine = [g for r, g in gradients if r.counts_here]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        infinite = norm_type == float("inf")
        if mine:
            found = [torch._foreach_norm(g, norm_type, dtype=dtype) for g in _alike(mine)]
            norms = torch.stack([part.to(self._device) for parts in found for part in parts])
            total += norms.max() if infinite else norms.double().pow(norm_type).sum()
        if self._world is not None:
            with self._world.guard("clip_grad_norm_"):
                self._world.all_reduce(total, "max" if infinite else "sum")
        norm = total if infinite else total.pow(1.0 / norm_type)
        scale = (max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
        for group in _alike([g for _, g in gradients]):
            torch._foreach_mul_(group, scale.to(group[0].device, group[0].dtype))
        return norm.to(dtype)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Whole tensors or DTensors by the model's names; each rank takes what it keeps, so that a
        state dict of the whole model fits every rank. strict: names that this rank needs must be
        there, and there may be no name that the model does not have."""
        del assign  # values are always copied: shards live where the optimizer knows them
        own = super().state_dict()
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in self._known]
        if strict and (missing or unexpected):
            raise OptionError(
                f"the state dict lacks {missing[:5]} and has {unexpected[:5]} that the model "
                "does not have: pass strict=False to load what fits"
            )
        by_name = {name: resting for resting in self._resting for name in resting.kept.names}
        with torch.no_grad():
            for name, target in own.items():
                if name not in state_dict:
                    continue
                value, resting = state_dict[name], by_name.get(name)
                if isinstance(value, DTensor) or resting is None:
                    target.copy_(value)
                else:
                    resting.load(value)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _choose(self, wanted: bool | None) -> Choose | None:
        """Of kernels for products; None for the heuristic's."""
        on_gpu = self._device.type == "cuda"
        return FastestKernels(self._world) if on_gpu and wanted is not False else None

    def _peer_groups(self, stage: int, wanted: bool | None) -> PeerGroups | None:
        """For a compiled step that is one program."""
        wanted = self._device.type == "cuda" if wanted is None else wanted
        if self._world is None or self._comm is None or not (self._compiled and wanted):
            return None
        if whole_step(self._lowered, stage) is None:
            return None
        names = [name for name, _ in self._comm.groups[stage]]
        return PeerGroups(self._world, names)

    def _rest(self, kept: KeptParameter, whole: Tensor) -> RestingParameter:
        return RestingParameter(
            kept,
            whole,
            self,
            mesh=self._lowered.stages[kept.stage].mesh,
            rank=self._rank,
            device=self._device,
            comm=self._comm,
        )

    def _fill_buffers(self, model: nn.Module, values: Initialiser) -> None:
        """Registers every kept buffer."""
        shapes = {n: tuple(b.shape) for n, b in model.named_buffers(remove_duplicate=False)}
        for buffer in self._kept_buffers:
            scope, leaf = scope_of(self, buffer.name)
            whole = values(buffer.name, shapes[buffer.name])
            scope._buffers[leaf] = whole.to(self._device, copy=True)
            if not buffer.persistent:
                scope._non_persistent_buffers_set.add(leaf)

    def _play(
        self, batch: Any, seed: int, mode: Mode, what: str
    ) -> tuple[Mapping[int, StageResult], Tensor]:
        """Results by stage, and the loss."""
        player = self._row_player(batch, seed, mode)  # unguarded: a wrong batch breaks nothing
        with self._guarded(what):
            results = player.play()
            return results, self._share_loss(results)

    def _guarded(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Other ranks are told of what fails in it."""
        return contextlib.nullcontext() if self._world is None else self._world.guard(what)

    def _row_player(self, batch: Any, seed: int, mode: Mode) -> RowPlayer:
        feed = self._data.feed(batch)
        inputs = {stage: self._inputs(stage, feed, seed) for stage in self._executors}
        return RowPlayer(self._row, self._executors, inputs, mode)

    def _inputs(self, stage: int, feed: BatchFeed, seed: int) -> StepInputs:
        resting = [r for r in self._resting if r.kept.key and r.kept.stage == stage]
        buffers = {
            key: [_buffer(self, buffer.name)]
            for buffer in self._kept_buffers
            for of, key in buffer.keys
            if of == stage
        }
        with torch.no_grad():
            shards = {r.kept.key: [r.at_rest()] for r in resting}
        return StepInputs(shards, buffers, feed, seed)

    def _share_loss(self, results: Mapping[int, StageResult]) -> Tensor:
        """The loss on every rank of every stage."""
        last = self._lowered.stages[self._lowered.loss_stage]
        made = results[last.index].loss if last.index in results else None
        loss = None if made is None else made[0]
        if self._comm is None or self._world is None:
            if loss is None:
                raise PlanError("no stage of the plan makes a loss")
            return loss
        self._comm.transport.flush()
        if loss is None:
            port = last.forward.outputs[LOSS]
            loss = torch.empty(port.meta.shape, dtype=port.meta.dtype, device=self._device)
        return self._world.broadcast(loss.contiguous(), last.devices[0])


def _make_executors(
    plan: ParallelPlan,
    lowered: LoweredPlan,
    graph: Graph,
    stages: Sequence[int],
    comm: RankComm | None,
    device: torch.device,
    *,
    compiled: bool,
    cuda_graph: bool | None,
    peers: PeerGroups | None,
    choose: Choose | None,
) -> dict[int, StageExecutor]:
    """One per stage that this rank plays. Without a process group the rank plays all of them."""
    mailboxes = Mailboxes(lowered.stages, device)
    executors = {}
    for index in stages:
        stage = lowered.stages[index]
        rank = 0 if comm is None else comm.rank
        coordinates = stage.mesh.coordinates(rank)
        virtual = VirtualCollectives(stage.mesh)
        collectives = virtual if comm is None else comm.collectives[index]
        players = interpreted = interpreter([coordinates], collectives, device)
        whole = play_whole = None
        if compiled:
            parameters = [p.name for p in stage.parameters]
            groups = () if comm is None else comm.groups[index]
            players = compiler(players, coordinates, groups, parameters, device, choose=choose)
            whole = whole_step(lowered, index)
            predicted = plan.stages[index].prediction
            seconds = predicted.forward_s + predicted.backward_s
            captures = device.type == "cuda" and cuda_graph is not False
            play_whole = compiler(
                interpreted,
                coordinates,
                groups,
                parameters,
                device,
                peers,
                _copies_if(captures, seconds),
                gradients=() if comm is None else parameters,  # of a whole step, by these names
                choose=choose,
            )
            if captures:
                staying = {*parameters, *stage.buffers}
                play_whole = capturer(play_whole, staying, None if cuda_graph else seconds)
        executors[index] = StageExecutor(
            lowered,
            graph,
            index,
            ranks=(rank,),
            players=players,
            transport=mailboxes if comm is None else comm.transport,
            device=device,
            whole=whole,
            play_whole=play_whole,
        )
    return executors


def _copies_if(captures: bool, seconds: float) -> Callable[[int], bool]:
    """Whether a program of so many operators makes copies of its collectives: not in a graph, if
    they are short."""
    return lambda operators: not captures or seconds >= SHORT_S * operators


def _buffer(root: nn.Module, name: str) -> Tensor:
    scope, leaf = scope_of(root, name)
    buffer = scope._buffers[leaf]
    if buffer is None:
        raise InternalError(f"{name!r} is not a buffer of this rank")
    return buffer


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those of one device and type together."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize
