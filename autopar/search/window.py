"""A cut, written with few layers: runs of equal layers in a stage are written twice and folded.

    stage of a run of n equal layers under one policy     written as
      at an end of the stage or of the run                1 explicit at that end
      the rest, if 3 or more                              2, folded: they stand for all of them
      the rest, if fewer                                  as they are

A break ends a run within equal layers, so that those before it and those behind it are folded each
for themselves and need not choose alike.

Of a run of equal stages three are written: its ends, which have other neighbours, and one for all
between. So the integer program of a stage grows with its distinct layers only, and the work on a
cut with its distinct stages. `Piece` and `Window.stage_of` remember what the written layers and
stages stand for, so that the solution can be written out again.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.errors import InternalError
from autopar.graph.program import Graph
from autopar.graph.repeat import Folded, with_copies
from autopar.intraop.fold import NotFoldable
from autopar.intraop.split import Split
from autopar.intraop.stage_problem import Fold
from autopar.plan import Remat
from autopar.simulate import Transfer

_FOLDED = 2  # a folded run is written so often


@dataclass(frozen=True, slots=True)
class Piece:
    """A written layer, or two that are folded. first, count: layers of the model that it stands
    for."""

    first: int
    count: int
    folded: bool
    remat: Remat

    @property
    def num_written(self) -> int:
        return _FOLDED if self.folded else 1


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """graph: of the written layers, without recomputation. first_layers: written, of each written
    stage. pieces: of each written stage, in order. stage_of: of each stage of the model, the
    written one that stands for it. starts: first layers of the stages of the model."""

    graph: Graph
    first_layers: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    stage_of: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def policies(self) -> tuple[Remat, ...]:
        """Of each written layer."""
        return tuple(
            piece.remat
            for stage in self.pieces
            for piece in stage
            for _ in range(piece.num_written)
        )

    def stands_for(self, written: int) -> tuple[int, ...]:
        """The stages of the model that a written stage stands for."""
        return tuple(i for i, w in enumerate(self.stage_of) if w == written)

    def all_transfers(self, written: Sequence[Transfer]) -> list[Transfer]:
        """Those between written stages, between the stages that they stand for: neighbours send to
        neighbours. NotFoldable where one comes from further away, from a stage that stands for
        many."""
        found = []
        for transfer in written:
            source, target = transfer.source_stage, transfer.target_stage
            step = target - source
            senders = self.stands_for(source)
            if abs(step) > 1 and len(senders) > 1:
                raise NotFoldable(f"written stage {source} of {len(senders)} sends to {target}")
            for index in self.stands_for(target):
                sender = index - step if abs(step) == 1 else senders[0]
                found.append(replace(transfer, source_stage=sender, target_stage=index))
        return found

    def folds(self, stage: int) -> tuple[Fold, ...]:
        """Of a written stage, by written layer."""
        position = self.first_layers[stage]
        found = []
        for piece in self.pieces[stage]:
            if piece.folded:
                found.append(Fold(position, piece.count))
            position += piece.num_written
        return tuple(found)

    def break_of(self, stage: int, split: Split) -> int:
        """The layer of the model before which a fold of a written stage is split."""
        folded = [piece for piece in self.pieces[stage] if piece.folded]
        return folded[split.fold].first + split.layers

    def written_layer(self, layer: int) -> int:
        """The written layer that stands for a layer of the model."""
        stage = bisect_right(self.starts, layer) - 1
        written = self.stage_of[stage]
        layer += self.pieces[written][0].first - self.starts[stage]
        position = self.first_layers[written]
        for piece in self.pieces[written]:
            if piece.first <= layer < piece.first + piece.count:
                inner = layer - piece.first
                return position + (min(inner, 1) if piece.folded else 0)
            position += piece.num_written
        raise IndexError(layer)


def write_window(
    folded: Folded,
    kinds: Sequence[int],
    first_layers: Sequence[int],
    policies: Sequence[Remat],
    *,
    fold: bool = True,
    stages: Sequence[Hashable] | None = None,
    breaks: Collection[int] = (),
) -> Window:
    """kinds: of each layer of the folded graph, equal ones are equal layers. first_layers: of the
    stages. policies: of each layer of the model. fold: False to write every layer. stages: of each
    stage, equal ones are equal stages; None to write all of them. breaks: layers of the model
    before which runs of equal layers end; of equal stages those in the one that is written
    count."""
    regions = _regions(folded, kinds)
    bounds = list(itertools.pairwise([*first_layers, folded.num_layers]))
    ends = itertools.accumulate(layer in breaks for layer in range(folded.num_layers))
    runs = list(zip(policies, ends, strict=True))

    def written(stage_of: Sequence[int]) -> tuple[tuple[Piece, ...], ...]:
        return tuple(
            tuple(_stage_pieces(regions, runs, *bounds[stage_of.index(number)], fold))
            for number in range(stage_of[-1] + 1)
        )

    each = tuple(range(len(bounds)))
    stage_of = each if stages is None else _written_stages(stages)
    pieces = written(stage_of)
    if stage_of != each and not _can_be_written(regions, pieces):
        stage_of, pieces = each, written(each)
    starts = itertools.accumulate(
        (sum(p.num_written for p in stage) for stage in pieces), initial=0
    )
    return Window(
        with_copies(folded, _copies(folded, regions, pieces)),
        tuple(starts)[: len(pieces)],
        pieces,
        stage_of,
        tuple(first_layers),
    )


def _written_stages(stages: Sequence[Hashable]) -> tuple[int, ...]:
    """Of each stage the written one that stands for it."""
    found: list[int] = []
    for _, group in itertools.groupby(stages):
        count, first = len(list(group)), found[-1] + 1 if found else 0
        found += [first + min(i, 1) + (count > 2 and i == count - 1) for i in range(count)]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Region:
    """Equal consecutive layers of the model. repeated: the layer of the folded graph among them
    that stands for several, -1 without one; fixed: how many others of the folded graph are here."""

    first: int
    stop: int
    repeated: int
    fixed: int


def _regions(folded: Folded, kinds: Sequence[int]) -> list[_Region]:
    regions: list[_Region] = []
    written = first = 0
    for _, group in itertools.groupby(kinds):
        layers = range(written, written + len(list(group)))
        stop = first + sum(folded.copies[layer] for layer in layers)
        repeated = [layer for layer in layers if folded.copies[layer] > 1]
        one = len(repeated) == 1
        regions.append(_Region(first, stop, repeated[0] if one else -1, len(layers) - one))
        written, first = layers.stop, stop
    return regions


def _stage_pieces(
    regions: Sequence[_Region],
    runs: Sequence[tuple[Remat, int]],
    start: int,
    stop: int,
    fold: bool,
) -> Iterator[Piece]:
    """The layers start .. stop - 1 of the model. runs: of each layer, equal in a run."""
    for region in regions:
        low, high = max(start, region.first), min(stop, region.stop)
        for (remat, _), group in itertools.groupby(range(low, high), key=runs.__getitem__):
            layers = list(group)
            head = layers[:1] if layers[0] in (start, region.first) else []
            ends = (stop - 1, region.stop - 1)
            tail = layers[-1:] if layers[-1] in ends and len(layers) > 1 else []
            inner = layers[len(head) : len(layers) - len(tail)]
            shorter = fold and region.repeated >= 0 and len(inner) > _FOLDED
            yield from (Piece(layer, 1, False, remat) for layer in head)
            if shorter:
                yield Piece(inner[0], len(inner), True, remat)
            else:
                yield from (Piece(layer, 1, False, remat) for layer in inner)
            yield from (Piece(layer, 1, False, remat) for layer in tail)


def _num_written(region: _Region, pieces: Sequence[Sequence[Piece]]) -> int:
    return sum(
        piece.num_written
        for stage in pieces
        for piece in stage
        if region.first <= piece.first < region.stop
    )


def _can_be_written(regions: Sequence[_Region], pieces: Sequence[Sequence[Piece]]) -> bool:
    """Whether the folded graph can have these layers: only some of its layers can be repeated."""
    return all(
        _num_written(r, pieces) > r.fixed
        if r.repeated >= 0
        else _num_written(r, pieces) == r.stop - r.first
        for r in regions
    )


def _copies(
    folded: Folded, regions: Sequence[_Region], pieces: Sequence[Sequence[Piece]]
) -> tuple[int, ...]:
    """How often each layer of the folded graph is written."""
    copies = list(folded.copies)
    for region in regions:
        if region.repeated >= 0:
            written = _num_written(region, pieces)
            copies[region.repeated] = written - region.fixed
            if copies[region.repeated] < 1:
                raise InternalError(
                    f"{written} layers cannot be written with {region} of {folded.copies}"
                )
    return tuple(copies)
