"""What the planner asks of a candidate: where its stages go."""

from __future__ import annotations

import pytest

from autopar.candidate import place_stages
from autopar.errors import MeshError
from autopar.mesh import Submesh
from cost_models import Cluster

ONE, TWO = Submesh(1, 1), Submesh(1, 2)


def test_each_stage_has_its_own_devices_the_largest_first() -> None:
    placed = place_stages([ONE, TWO, ONE], Cluster.parse("cpu:1x4"))
    assert placed == ((2,), (0, 1), (3,))


def test_stages_take_turns_on_groups_of_devices() -> None:
    placed = place_stages([ONE, TWO] * 3, Cluster.parse("cpu:1x3"), num_workers=2)
    assert placed == ((2,), (0, 1)) * 3
    with pytest.raises(MeshError, match="stage 2 takes turns with stage 0"):
        place_stages([ONE, TWO, TWO, ONE], Cluster.parse("cpu:1x3"), num_workers=2)
    with pytest.raises(MeshError, match="use 2 of the 3 devices"):
        place_stages([TWO, TWO], Cluster.parse("cpu:1x3"), num_workers=1)
