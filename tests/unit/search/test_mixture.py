"""Which layers recompute, as attempts at a stage that does not fit ask for more of them."""

from __future__ import annotations

import pytest

from autopar.intraop.compose import Frontier, Point
from autopar.plan import Remat
from autopar.search.mixture import stage_policies

FAST, MIDDLE, SMALL = Remat.NONE, Remat.SELECTIVE, Remat.FULL
KINDS = [0] * 8


def frontier() -> Frontier:
    """10, 5 or 1 bytes saved by a layer."""
    return tuple(
        Point(seconds, 0.0, saved, 0.0, policy)
        for seconds, saved, policy in ((1.0, 10.0, FAST), (1.2, 5.0, MIDDLE), (1.5, 1.0, SMALL))
    )


def policies(budget_bytes: float, extra: float) -> list[Remat]:
    return stage_policies([frontier()], KINDS, 1, budget_bytes, extra=extra, least=FAST)


@pytest.mark.parametrize(
    ("extra", "recomputing"), [(0.0, 0), (0.25, 2), (0.75, 6), (1.0, 8), (1.75, 8)]
)
def test_more_layers_recompute_where_the_tables_say_that_all_fit(
    extra: float, recomputing: int
) -> None:
    """What the tables do not see of a stage may be all that its layers save."""
    fast = 8 - recomputing
    assert policies(1000.0, extra) == [SMALL] * recomputing + [FAST] * fast


def test_more_layers_recompute_than_the_tables_mix() -> None:
    """60 bytes of 80: half of the layers save 5, and others join them."""
    room = 60.0 / 0.98
    assert policies(room, 0.0) == [MIDDLE] * 4 + [FAST] * 4
    assert policies(room, 0.25) == [MIDDLE] * 6 + [FAST] * 2
    assert policies(room, 1.75) == [SMALL] * 8
