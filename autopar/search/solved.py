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


class StageTooLarge(Exception):
    """Stages that do not fit as their layers recompute now. reason: of the first."""

    def __init__(self, stages: tuple[int, ...], reason: NoFeasiblePlan) -> None:
        super().__init__(str(reason))
        self.stages, self.reason = stages, reason


class Race(NamedTuple):
    """The step of another cut, and the stages of this one of which no fewer layers will
    recompute."""

    known_s: float
    final: frozenset[int]


class Tries:
    """The attempts at one cut (a builder, local to it). `extra`: of each stage the share of its
    layers that recompute beyond what the tables say. known: by the policies of all layers."""

    def __init__(self, num_stages: int, known_s: float) -> None:
        self.known: dict[tuple[Remat, ...], SolvedCut | StageTooLarge] = {}
        self.known_s = known_s
        self._too_little = [-math.inf] * num_stages  # the most with which a stage did not fit

    def failed(self, stages: Sequence[int], extra: Sequence[float]) -> None:
        for stage in stages:
            self._too_little[stage] = max(self._too_little[stage], extra[stage])

    def may_fit(self, stage: int, extra: float) -> bool:
        """What did not fit does not with fewer layers that recompute either."""
        return extra > self._too_little[stage]

    def final(self, extra: Sequence[float]) -> frozenset[int]:
        """Stages of which no fewer layers will recompute."""
        return frozenset(
            i for i, e in enumerate(extra) if not any(self.may_fit(i, e - less) for less in LESS)
        )

    def race(self, extra: Sequence[float]) -> Race | None:
        return Race(self.known_s, self.final(extra)) if self.known_s < math.inf else None
