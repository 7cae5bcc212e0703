"""The inter-op program is checked when it is made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopar.errors import InternalError, OptionError
from autopar.interop.problem import InterOpProblem


def problem() -> InterOpProblem:
    return InterOpProblem(
        num_layers=3,
        num_devices=4,
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


def test_arrays_become_read_only_views() -> None:
    source = np.ones((3, 3, 3, 3))
    made = replace(problem(), stage_seconds=source)
    assert not made.stage_seconds.flags.writeable
    assert source.flags.writeable


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"submesh_devices": ()}, "submeshes have devices"),
        ({"stage_seconds": np.ones((3, 3, 2, 3))}, "stage_seconds ends in shape"),
        ({"stage_seconds": np.full((3, 3, 3, 3), np.nan)}, "NaN"),
        ({"transfer_seconds": np.ones((3, 3))}, "layer 0 receives"),
        ({"transfer_seconds": -np.ones((3, 3))}, "negative"),
        ({"in_flight": (1, 2)}, "for each of 3 stages"),
        ({"in_flight": (1, 2, 4)}, "a row of 1..3"),
    ],
)
def test_malformed_problems(change: dict[str, object], text: str) -> None:
    with pytest.raises(InternalError, match=text):
        replace(problem(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("pins", [(0, None), (3, 2), (1, 0)])
def test_pins_that_cannot_be_honoured(pins: tuple[int, int | None]) -> None:
    with pytest.raises(OptionError, match="min_stages"):
        replace(problem(), min_stages=pins[0], max_stages=pins[1])
