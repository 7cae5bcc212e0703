"""What attempts at a cut show: what is tried again, and when a cut has lost."""

from __future__ import annotations

import math

from autopar.errors import NoFeasiblePlan
from autopar.search.solved import Race, Tries, UnsolvedStages


def unsolved(*too_large: int, too_slow: tuple[int, ...] = ()) -> UnsolvedStages:
    return UnsolvedStages(too_large, too_slow, NoFeasiblePlan("why"))


def test_what_was_in_vain_is_not_tried_with_fewer_layers_that_recompute() -> None:
    tries = Tries(2, math.inf)
    assert tries.may_help(0, -1.0)
    tries.failed(unsolved(0), [0.25, 0.0])
    tries.failed(unsolved(0), [0.0, 0.0])
    assert not tries.may_help(0, 0.25)
    assert tries.may_help(0, 0.75)
    assert tries.may_help(1, -1.0)


def test_a_stage_is_final_where_nothing_less_may_help() -> None:
    tries = Tries(3, 2.0)
    tries.failed(unsolved(0, too_slow=(1,)), [0.25, 0.75, 0.0])
    extra = [0.75, 1.75, 0.0]  # the second may still do with 1.25
    assert tries.final(extra) == {0}
    assert tries.race(extra) == Race(2.0, frozenset({0}))
    assert Tries(3, math.inf).race(extra) is None
