"""Layers moved from stage to stage, against every move tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from autopar.interop.problem import InterOpProblem, StageChoice
from autopar.search import tables
from autopar.search.schedules import Expected, rough_seconds
from autopar.search.tables import Tables

LAYERS, STAGES = 14, 5


class Told(Tables):
    """Of a table that is given: stages pay a tenth of their seconds once per step, and have no room
    for ZB-H1."""

    def __init__(self, problem: InterOpProblem) -> None:
        self.problem, self.count = problem, problem.num_microbatches
        self._num_layers = problem.num_layers
        self.tried = 0

    def step_seconds(self, stages: Sequence[StageChoice]) -> float:
        assert self.problem is not None
        self.tried += 1
        expected = []
        for stage in stages:
            received_s = float(self.problem.transfer_seconds[stage.first_layer, stage.submesh])
            once_s = 0.1 * (stage.seconds - received_s)
            each_s = stage.seconds - received_s - once_s
            expected.append(Expected(each_s, received_s, self.count * once_s))
        return rough_seconds(expected, self.count, 1.0)


def priced(problem: InterOpProblem, sizes: Sequence[int]) -> tuple[StageChoice, ...] | None:
    """The cut with so many layers in each stage; None where some stage does not fit."""
    found, first = [], 0
    for index, size in enumerate(sizes):
        last, row = first + size - 1, problem.in_flight[len(sizes) - index - 1]
        seconds = float(problem.stage_seconds[row - 1][first, last, 0])
        seconds += float(problem.transfer_seconds[first, 0])
        found.append(StageChoice(first, last, 0, row, seconds))
        first = last + 1
    return tuple(found) if all(math.isfinite(s.seconds) for s in found) else None


def every_move(told: Told, stages: tuple[StageChoice, ...]) -> tuple[StageChoice, ...]:
    assert told.problem is not None
    best, best_s = stages, told.step_seconds(stages)
    while True:
        slowest = max(range(STAGES), key=lambda i: best[i].seconds)
        sizes = [s.last_layer - s.first_layer + 1 for s in best]
        trials = []
        for source, target in itertools.permutations(range(STAGES), 2):
            if sizes[source] > 1 and (source == slowest or abs(source - target) == 1):
                moved = list(sizes)
                moved[source] -= 1
                moved[target] += 1
                trials.append(priced(told.problem, moved))
        steps = [told.step_seconds(trial) if trial else math.inf for trial in trials]
        if min(steps) >= best_s * tables._WORTH_MOVING:
            return best
        best_s = min(steps)
        best = trials[steps.index(best_s)] or best


@pytest.mark.parametrize("count", [2, 8, 64])
def test_moves_that_are_not_tried_are_not_worth_it(count: int) -> None:
    random, fewer, changed = np.random.default_rng(count), 0, 0
    for _ in range(40):
        layer_s = random.uniform(0.5, 1.5, LAYERS)
        table = np.full((2, LAYERS, LAYERS, 1), np.inf)
        for first, last in itertools.combinations_with_replacement(range(LAYERS), 2):
            fits = last - first < 6
            seconds = layer_s[first : last + 1].sum() + random.uniform(0.0, 0.2)
            table[:, first, last, 0] = (seconds, 1.1 * seconds) if fits else np.inf
        transfers = np.concatenate([[0.0], random.uniform(0.0, 0.3, LAYERS - 1)])[:, None]
        rows = (1, 1, *[2] * (STAGES - 2))
        problem = InterOpProblem(
            LAYERS, (STAGES,), (1,), count, table, transfers, rows, max_stages=STAGES
        )
        cut = None
        while cut is None:
            bounds = np.sort(random.choice(np.arange(1, LAYERS), STAGES - 1, replace=False))
            cut = priced(problem, np.diff([0, *bounds, LAYERS]).tolist())
        told, all_tried = Told(problem), Told(problem)
        found = told.moved(cut)
        assert found == every_move(all_tried, cut)
        fewer += told.tried < all_tried.tried
        changed += found != cut
    assert changed
    assert fewer or count < STAGES  # there filling the pipeline is most of a step
