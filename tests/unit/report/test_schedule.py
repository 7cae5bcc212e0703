from __future__ import annotations

from autopar.report.schedule import plan_timeline, schedule_picture
from autopar.schedule import gpipe, interleaved, zb_h1
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


INTERLEAVED = """\
worker 0  aF0|aF1|bF0|bF1|........bB0----|....bB1----|aB0----|aB1----|
worker 1  ....aF0|aF1|bF0|bB0----|bF1|bB1----|aB0----|aB1----|........
"""
ZB_H1 = """\
stage 0  F0|F1|...B0|W0|B1|W1|
stage 1  ...F0|B0|F1|B1|W0|W1|
"""


def test_chunks_and_weights_are_told_apart() -> None:
    timeline = simulate(interleaved(4, 2, 2), [StageCost(1.0, 2.0)] * 4)
    columns = 4 * round(timeline.step_s)
    picture = schedule_picture(timeline, width=10 + columns).plain
    assert "\n".join(picture.splitlines()[:2]) + "\n" == INTERLEAVED
    assert "of worker 0 0 2" in picture
    timeline = simulate(zb_h1(2, 2), [StageCost(1.0, 2.0, weight_s=1.0)] * 2)
    picture = schedule_picture(timeline, width=9 + 3 * round(timeline.step_s)).plain
    assert "\n".join(picture.splitlines()[:2]) + "\n" == ZB_H1
    assert "W parameter gradients" in picture


def test_a_narrow_cell_keeps_its_stage_if_it_can() -> None:
    timeline = simulate(interleaved(2, 2, 1), [StageCost(1.0, 1.0, step_s=1.0)] * 2)
    row = schedule_picture(timeline, width=10 + 2 * 10).plain.splitlines()[0]
    assert row == "worker 0  a0b0b0a1a0b1b1a1stst"
