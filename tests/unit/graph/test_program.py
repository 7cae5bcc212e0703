"""Operators that differ from another in a few fields, or in what they read."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from autopar.graph.program import Operator, Phase, Ref, TensorMeta

aten = torch.ops.aten
_META = TensorMeta((2, 4), torch.float32)
_CAT = Operator(
    "cat", aten.cat.default, ([Ref("x"), Ref("y", 1)], -1), {"out": Ref("z")}, (_META,),
    Phase.FORWARD,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer": 3, "forward": "mm"},
        {"name": "cat_1"},
        {"args": ([Ref("y"), Ref("y")],), "kwargs": {}},
        {"results": (None, _META), "phase": Phase.BACKWARD},
    ],
)
def test_changed_is_what_replace_gives(changes: dict[str, Any]) -> None:
    got, want = _CAT.changed(**changes), replace(_CAT, **changes)
    for field in fields(Operator):
        assert getattr(got, field.name) == getattr(want, field.name)


def test_there_is_no_other_field() -> None:
    with pytest.raises(AttributeError):
        _CAT.changed(stage=1)


def test_other_values_are_asked_for_in_argument_order() -> None:
    asked: list[Ref] = []

    def new(ref: Ref) -> Ref:
        asked.append(ref)
        return Ref(ref.name.upper(), ref.index)

    got = _CAT.reading(new, layer=1)
    assert asked == list(_CAT.operands) == [Ref("x"), Ref("y", 1), Ref("z")]
    assert got.operands == (Ref("X"), Ref("Y", 1), Ref("Z")) and got.layer == 1
    assert type(got.args[0]) is list and got.args[1] == -1
    assert _CAT.reading(lambda ref: ref) is _CAT
