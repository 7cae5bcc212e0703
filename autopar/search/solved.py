"""A cut that is solved, and what the attempts at solving it show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autopar.candidate import Candidate
from autopar.errors import NoFeasiblePlan
from autopar.intraop.stage import StageSolution
from autopar.lowering.lower import PreparedStage
from autopar.plan import Remat
from autopar.search.window import Window

LESS = (1.0, 0.5)  # of the layers of a stage: how many fewer recompute where there may be room


@dataclass(frozen=True, slots=True, eq=False)
class SolvedCut:
    """A candidate with what it takes to write its plan: window and prepared stages. alike: as in
    `ExactSolver`."""

    candidate: Candidate
    window: Window
    policies: tuple[Remat, ...]  # of each layer of the model
    prepared: tuple[PreparedStage, ...]  # the written stages
    alike: bool

    def written_stage(self, number: int) -> StageSolution:
        return self.candidate.stages[self.window.stage_of.index(number)]


class SlowerCut(Exception):
    """A cut is seen to be slower than another one before it is solved."""


class UnsolvedStages(Exception):
    """Stages that have no solution of use as their layers recompute now. too_large: nothing fits.
    too_slow: what fits takes longer than was asked for. reason: of the first."""

    def __init__(
        self, too_large: Sequence[int], too_slow: Sequence[int], reason: NoFeasiblePlan
    ) -> None:
        super().__init__(str(reason))
        self.too_large, self.too_slow = tuple(too_large), tuple(too_slow)
        self.reason = reason

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(sorted((*self.too_large, *self.too_slow)))


class Race(NamedTuple):
    """The step of another cut, and the stages of this one of which no fewer layers will
    recompute."""

    known_s: float
    final: frozenset[int]


class Tries:
    """The attempts at one cut (a builder, local to it). `extra`: of each stage the share of its
    layers that recompute beyond what the tables say. known: by the policies of all layers."""

    def __init__(self, num_stages: int, known_s: float) -> None:
        self.known: dict[tuple[Remat, ...], SolvedCut | UnsolvedStages] = {}
        self.known_s = known_s
        self._in_vain = [-math.inf] * num_stages  # the most with which a stage was unsolved

    def failed(self, unsolved: UnsolvedStages, extra: Sequence[float]) -> None:
        for stage in unsolved.stages:
            self._in_vain[stage] = max(self._in_vain[stage], extra[stage])

    def may_help(self, stage: int, extra: float) -> bool:
        """What did not fit does not with fewer layers that recompute either, and what had to give
        up speed to fit has to give up more."""
        return extra > self._in_vain[stage]

    def final(self, extra: Sequence[float]) -> frozenset[int]:
        """Stages of which no fewer layers will recompute."""
        return frozenset(
            i for i, e in enumerate(extra) if not any(self.may_help(i, e - less) for less in LESS)
        )

    def race(self, extra: Sequence[float]) -> Race | None:
        return Race(self.known_s, self.final(extra)) if self.known_s < math.inf else None
