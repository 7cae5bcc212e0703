"""What stages hold where backward is split, against the schedule played."""

from __future__ import annotations

import pytest

from autopar.pace import pace
from autopar.schedule import ScheduleKind
from autopar.search.prices import SplitFlight
from autopar.simulate import StageCost


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_microbatches_in_flight_under_zb_h1(count: int) -> None:
    cost = StageCost(
        1.0, 2.0, weight_s=1.0, saved_bytes_per_microbatch=3.0, held_bytes_per_microbatch=5.0
    )
    for stages in (1, 2, 4):
        played = pace(ScheduleKind.ZB_H1, count, [cost] * stages).peak_bytes
        flights = [SplitFlight.zb_h1(stage, stages, count) for stage in range(stages)]
        assert [3 * f.begun + 5 * f.waiting for f in flights] == list(played)
