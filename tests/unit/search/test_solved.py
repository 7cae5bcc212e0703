"""What attempts at a cut show: what is tried again, and when a cut has lost."""

from __future__ import annotations

import math

from autopar.search.solved import Race, Tries


def test_what_did_not_fit_is_not_tried_with_fewer_layers_that_recompute() -> None:
    tries = Tries(2, math.inf)
    assert tries.may_fit(0, -1.0)
    tries.failed([0], [0.25, 0.0])
    tries.failed([0], [0.0, 0.0])
    assert not tries.may_fit(0, 0.25)
    assert tries.may_fit(0, 0.75)
    assert tries.may_fit(1, -1.0)


def test_a_stage_is_final_where_nothing_less_may_fit() -> None:
    tries = Tries(3, 2.0)
    tries.failed([0, 1], [0.25, 0.75, 0.0])
    extra = [0.75, 1.75, 0.0]  # the second may still fit with 1.25
    assert tries.final(extra) == {0}
    assert tries.race(extra) == Race(2.0, frozenset({0}))
    assert Tries(3, math.inf).race(extra) is None
