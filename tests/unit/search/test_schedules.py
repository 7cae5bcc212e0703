"""The rough step of stages that are not solved, against the schedule played."""

from __future__ import annotations

import random

import pytest

from autopar.schedule import ScheduleKind
from autopar.search.schedules import Expected, expected_seconds, rough_seconds
from autopar.search.space import WEIGHT_SHARE

ZB_BUBBLE = 1 - 2 * WEIGHT_SHARE


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    "kind, bubble", [(ScheduleKind.ONE_F_ONE_B, 1.0), (ScheduleKind.ZB_H1, ZB_BUBBLE)]
)
def test_rough_is_near_what_is_played(kind: ScheduleKind, bubble: float, seed: int) -> None:
    rng = random.Random(seed)
    count, transfer_s = rng.choice((1, 2, 4, 16, 64)), rng.choice((0.0, 0.1, 0.5))
    stages = [
        Expected(rng.uniform(0.8, 1.2), transfer_s if index else 0.0, rng.choice((0.0, 2.0)))
        for index in range(rng.choice((1, 2, 4, 8)))
    ]
    played = expected_seconds(stages, count, kind)
    assert rough_seconds(stages, count, bubble) == pytest.approx(played, rel=0.25)


def test_one_stage_is_its_work() -> None:
    stage = [Expected(1.0, 0.0, 3.0)]
    assert rough_seconds(stage, 4, 1.0) == expected_seconds(stage, 4, ScheduleKind.ONE_F_ONE_B) == 7
