"""Which transfers a stage takes part in, when, and how tiles are cut from and put into shards.

Between the devices of two workers values go through one channel per direction, in the order in
which the receiving worker asks for them, which both sides find here: parameters, then per action
of the schedule the values of each sending stage in the order of `LoweredPlan.transfers`, then
gradients. A value that is made early, for a skip connection, waits at the sender for its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autopar.actions import Action, ActionKind
from autopar.graph.program import Phase
from autopar.layout import is_uneven, local_atoms, local_shape
from autopar.lowering.lower import LoweredPlan, LoweredStage
from autopar.lowering.transfer import Tile, Transfer, make_tiles
from autopar.mesh import LogicalMesh
from autopar.runtime.interpreter import Shards
from autopar.schedule import execution_order

Route = tuple[Transfer, ...]


class Transport(Protocol):
    """Moves values between stages for the ranks that this process plays. A send never blocks; a
    receive blocks until the value has been sent. action: of the stage that sends or receives; None
    is the fetch before all of them."""

    def begin(self, *, trains: bool) -> None:
        """A step, of all actions or of forward ones."""

    def send(self, transfers: Route, values: Sequence[Shards], action: Action | None) -> None: ...

    def receive(self, transfers: Route, action: Action | None) -> list[Shards]: ...


@dataclass(frozen=True, slots=True)
class StageRoutes:
    """Transfers of one stage, out and in: parameters that it lends and borrows (fetch), values of
    forward and of backward, gradients of borrowed parameters (give back)."""

    fetch_out: Route
    fetch_in: Route
    forward_out: Route
    forward_in: Route
    backward_out: Route
    backward_in: Route
    return_out: Route
    return_in: Route


def stage_routes(lowered: LoweredPlan, stage: int) -> StageRoutes:
    """The routes of one stage. O(transfers)."""
    returns = gradient_returns(lowered)
    once = tuple(t for t in lowered.transfers if t.phase is None)
    forward = tuple(t for t in lowered.transfers if t.phase is Phase.FORWARD)
    backward = tuple(t for t in lowered.transfers if t.phase is Phase.BACKWARD)
    pairs = [
        (
            tuple(t for t in group if t.source_stage == stage),
            tuple(t for t in group if t.target_stage == stage),
        )
        for group in (once, forward, backward, returns)
    ]
    return StageRoutes(*(route for pair in pairs for route in pair))


def gradient_returns(lowered: LoweredPlan) -> Route:
    """The way back of each borrowed parameter whose gradient the borrower makes."""
    return tuple(
        Transfer(
            source_key=t.target_key,
            target_key=t.source_key,
            source_stage=t.target_stage,
            target_stage=t.source_stage,
            phase=None,
            meta=t.meta,
            dims=t.dims,
            source_layout=t.target_layout,
            target_layout=t.source_layout,
            tiles=make_tiles(
                t.dims,
                t.target_layout,
                lowered.stages[t.target_stage].mesh,
                t.source_layout,
                lowered.stages[t.source_stage].mesh,
            ),
        )
        for t in lowered.transfers
        if t.phase is None and t.target_key in sources_with_gradient(lowered.stages[t.target_stage])
    )


def sources_with_gradient(stage: LoweredStage) -> set[str]:
    """Parameter inputs at rest for which the stage makes a gradient, through any of their uses."""
    made = set(stage.gradients)
    return {p.source for p in stage.parameters if p.name in made}


Channel = tuple[tuple[int, ...], tuple[int, ...]]  # the devices at its ends


def channels(lowered: LoweredPlan) -> dict[Channel, list[tuple[int, int]]]:
    """Between which devices something is sent, with those of either end that send and get it; in
    one order for all ranks."""
    found: dict[Channel, set[tuple[int, int]]] = {}
    for t in (*lowered.transfers, *gradient_returns(lowered)):
        sources, targets = (lowered.stages[i].devices for i in (t.source_stage, t.target_stage))
        pairs = found.setdefault((sources, targets), set())
        ends = ((sources[tile.source], targets[tile.target]) for tile in t.tiles)
        pairs.update((sender, receiver) for sender, receiver in ends if sender != receiver)
    return {channel: sorted(found[channel]) for channel in sorted(found)}


class Message(NamedTuple):
    """What one stage sends for one action of another one; None is its fetch."""

    action: Action | None
    source_stage: int
    target_stage: int


def message_for(transfer: Transfer, action: Action | None) -> Message:
    """To which message a transfer belongs. action: of the stage that sends or receives."""
    target = transfer.target_stage
    received = None if action is None else Action(action.kind, target, action.microbatch)
    return Message(received, transfer.source_stage, target)


def message_order(
    lowered: LoweredPlan, sender: int, *, trains: bool
) -> dict[Channel, list[Message]]:
    """What a device sends to other workers in a step, channel by channel, in the order in which it
    is asked for. That is one in which all actions can be played, so that nothing is waited for that
    waits for what comes after it. O(transfers x microbatches)."""
    cells = execution_order(lowered.schedule)
    position = {lowered.schedule.actions[c.worker][c.position]: i for i, c in enumerate(cells)}

    def key(message: Message) -> tuple[int, int, int]:
        action = message.action
        if action is None:
            return 0, message.target_stage, message.source_stage
        if action.kind is ActionKind.REDUCE:  # a row's later stages first
            return 2, -message.target_stage, message.source_stage
        return 1, position[action], message.source_stage

    found: dict[Channel, set[Message]] = {}
    returns = [(t, True) for t in gradient_returns(lowered) if trains]
    for t, is_return in (*((t, False) for t in lowered.transfers), *returns):
        sources, targets = (lowered.stages[i].devices for i in (t.source_stage, t.target_stage))
        if sources == targets or all(sources[tile.source] != sender for tile in t.tiles):
            continue
        actions: list[Action | None] = [None]
        if is_return:
            actions = [Action(ActionKind.REDUCE, t.source_stage)]
        elif t.phase is not None:
            forward = t.phase is Phase.FORWARD
            kind = ActionKind.FORWARD if forward else ActionKind.BACKWARD
            counts = range(lowered.schedule.num_microbatches) if forward or trains else ()
            actions = [Action(kind, t.source_stage, m) for m in counts]
        found.setdefault((sources, targets), set()).update(message_for(t, a) for a in actions)
    return {channel: sorted(messages, key=key) for channel, messages in found.items()}


def box_of(transfer: Transfer) -> tuple[int, int, str]:
    """Where the values of a transfer queue up, in a process that both sends and receives them."""
    return transfer.source_stage, transfer.target_stage, transfer.target_key


def cut_tile(shard: Tensor, transfer: Transfer, mesh: LogicalMesh, tile: Tile) -> Tensor:
    """The part of a sender's shard that a tile names, in atoms: a view where strides allow it."""
    part = shard.reshape(local_atoms(transfer.dims, transfer.source_layout, mesh.axis_sizes))
    for atom, (start, length) in enumerate(tile.source_window):
        part = part.narrow(atom, start, length)
    return part


def tile_shape(tile: Tile) -> tuple[int, ...]:
    return tuple(length for _, length in tile.target_window)


def join_tiles(
    transfer: Transfer,
    mesh: LogicalMesh,
    tiles: Sequence[tuple[Tile, Tensor]],
    device: torch.device,
) -> Tensor:
    """A receiver's shard from all of its tiles; padding is zero. A single tile that covers it is
    the shard."""
    sizes = mesh.axis_sizes
    shape = local_shape(transfer.dims, transfer.target_layout, sizes)
    atoms = local_atoms(transfer.dims, transfer.target_layout, sizes)
    if len(tiles) == 1 and tile_shape(tiles[0][0]) == atoms:
        return tiles[0][1].reshape(shape)
    padded = is_uneven(transfer.dims, transfer.target_layout, sizes)
    make = torch.zeros if padded else torch.empty
    whole = make(atoms, dtype=transfer.meta.dtype, device=device)
    for tile, value in tiles:
        window = whole
        for atom, (start, length) in enumerate(tile.target_window):
            window = window.narrow(atom, start, length)
        window.copy_(value)
    return whole.reshape(shape)
