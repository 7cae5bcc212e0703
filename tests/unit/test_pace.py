"""The pace of a step against the simulation of every event."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.actions import ActionKind
from autopar.pace import pace
from autopar.schedule import ScheduleKind, build_schedule
from autopar.simulate import StageCost, Transfer, simulate


@pytest.mark.parametrize(
    ("kind", "stages", "count", "workers"),
    [
        (ScheduleKind.ONE_F_ONE_B, 1, 3, None),
        (ScheduleKind.ONE_F_ONE_B, 5, 2, None),
        (ScheduleKind.ONE_F_ONE_B, 4, 9, None),
        (ScheduleKind.GPIPE, 3, 4, None),
        (ScheduleKind.ZB_H1, 4, 9, None),
        (ScheduleKind.INTERLEAVED, 6, 9, 3),
    ],
)
def test_the_pace_is_that_of_the_simulation(
    kind: ScheduleKind, stages: int, count: int, workers: int | None
) -> None:
    random = np.random.default_rng(stages * count)
    for _ in range(3):
        costs = []
        for _ in range(stages):
            some = random.uniform(0.1, 3.0, 10).tolist()
            costs.append(StageCost(some[0], some[1] + some[7], *some[2:8], *some[8:]))
        pairs = [(s, s + 1) for s in range(stages - 1)]
        pairs += [(0, stages - 1)] if stages > 2 else []  # one that skips stages
        transfers = [
            Transfer(*ends, phase, random.uniform(0, 2.0))
            for pair in pairs
            for phase, ends in (
                (ActionKind.FORWARD, pair),
                (ActionKind.BACKWARD, pair[::-1]),
            )
        ]
        found = pace(kind, count, costs, transfers, workers)
        timeline = simulate(build_schedule(kind, stages, count, workers), costs, transfers)
        assert found.step_s == pytest.approx(timeline.step_s, rel=1e-12)
        assert found.peak_bytes == pytest.approx(timeline.peak_bytes)
        assert found.worker_peak_bytes == pytest.approx(timeline.worker_peak_bytes)
