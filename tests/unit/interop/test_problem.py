"""The inter-op program is checked when it is made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopar.errors import InternalError, OptionError
from autopar.interop.dp import solve
from autopar.interop.problem import FloatArray, InterOpProblem


def problem() -> InterOpProblem:
    return InterOpProblem(
        num_layers=3,
        num_devices=(4,),
        submesh_devices=(1, 2, 4),
        num_microbatches=4,
        stage_seconds=np.ones((3, 3, 3, 3)),
        transfer_seconds=np.zeros((3, 3)),
        in_flight=(1, 2, 3),
    )


def test_stage_limit() -> None:
    assert problem().stage_limit == 3
    assert replace(problem(), submesh_devices=(2, 2, 4)).stage_limit == 2
    assert problem().with_stages(2).stage_limit == 2
    assert problem().with_stages(2).min_stages == 2


def test_the_stage_limit_counts_each_group() -> None:
    two = replace(problem(), num_devices=(4, 2), submesh_groups=(0, 1, 0), num_layers=3)
    assert two.stage_limit == 3  # 4 / 1 in the first, 2 / 2 in the second, but three layers
    assert replace(two, submesh_devices=(4, 2, 4)).stage_limit == 2
    assert replace(two, submesh_devices=(4, 2, 4), submesh_groups=(0, 0, 0)).stage_limit == 2


def test_arrays_become_read_only_views() -> None:
    source = np.ones((3, 3, 3, 3))
    made = replace(problem(), stage_seconds=source)
    assert not made.row(1).flags.writeable and not made.transfer_seconds.flags.writeable
    assert source.flags.writeable


def test_rows_may_be_made_when_asked_for() -> None:
    asked = []

    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, row: int) -> FloatArray:
            asked.append(row)
            return np.full((3, 3, 3), row + 1.0)

    lazy = replace(problem(), stage_seconds=Rows())
    assert asked == []
    whole = replace(problem(), stage_seconds=np.stack([Rows()[row] for row in range(3)]))
    asked.clear()
    assert solve(lazy).stages == solve(whole).stages
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"submesh_devices": ()}, "submeshes have devices"),
        ({"num_devices": (4, 0)}, "num_devices"),
        ({"submesh_groups": (0, 0)}, "each of 3 submeshes"),
        ({"submesh_groups": (0, 0, 1)}, "one of 1 groups"),
        ({"transfer_seconds": np.ones((3, 2))}, "transfer_seconds has shape"),
        ({"transfer_seconds": np.ones((3, 3))}, "layer 0 receives"),
        ({"transfer_seconds": -np.ones((3, 3))}, "negative"),
        ({"in_flight": (1, 2)}, "for each of 3 stages"),
        ({"in_flight": (1, 2, 4)}, "a row of 1..3"),
    ],
)
def test_malformed_problems(change: dict[str, object], text: str) -> None:
    with pytest.raises(InternalError, match=text):
        replace(problem(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (np.ones((3, 3, 2, 3)), r"a row of stage_seconds has shape \(3, 3, 3\)"),
        (np.full((3, 3, 3, 3), np.nan), "NaN"),
    ],
)
def test_malformed_rows(rows: FloatArray, text: str) -> None:
    with pytest.raises(InternalError, match=text):
        replace(problem(), stage_seconds=rows).row(2)


@pytest.mark.parametrize("pins", [(0, None), (3, 2), (1, 0)])
def test_pins_that_cannot_be_honoured(pins: tuple[int, int | None]) -> None:
    with pytest.raises(OptionError, match="min_stages"):
        replace(problem(), min_stages=pins[0], max_stages=pins[1])
