from __future__ import annotations

from autopar.report.schedule import plan_timeline, schedule_picture
from autopar.schedule import gpipe
from autopar.simulate import StageCost, simulate
from tests.unit.report.plans import hand_plan

GPIPE = """\
stage 0  F0|F1|.........B0---|B1---|
stage 1  ...F0|F1|B0---|B1---|......
         0                    9.00 s
"""


def test_gpipe_is_drawn_to_scale() -> None:
    timeline = simulate(gpipe(2, 2), [StageCost(1.0, 2.0)] * 2)
    picture = schedule_picture(timeline, width=9 + 27)
    assert "\n".join(picture.plain.splitlines()[:3]) + "\n" == GPIPE


def test_every_row_is_as_wide_as_asked_and_idle_time_is_stated() -> None:
    picture = schedule_picture(plan_timeline(hand_plan()), width=100).plain
    rows = picture.splitlines()
    assert [len(row) for row in rows[:3]] == [100] * 3
    assert "idle (.)" in rows[3]


def test_cells_narrower_than_their_label_show_the_microbatch() -> None:
    timeline = simulate(gpipe(1, 12), [StageCost(1.0, 1.0)])
    row = schedule_picture(timeline, width=9 + 24).plain.splitlines()[0]
    assert row == "stage 0  " + "012345678901" * 2
