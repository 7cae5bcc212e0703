"""The emitter: one reshard per value and layout, collectives on contiguous leading dims."""

from __future__ import annotations

import torch

from autopar.graph.program import Ref
from autopar.layout import PARTIAL, REPLICATE, Dims, Offset
from autopar.lowering.emitter import Emitter
from autopar.lowering.program import CollectiveOp, Communicate, Compute

aten = torch.ops.aten
DIMS: Dims = ((8,), (4,))


def _emitter(layout: tuple[int, ...], mesh: tuple[int, ...] = (2,)) -> Emitter:
    emit = Emitter(mesh)
    emit.define(Ref("x"), DIMS, layout, Ref("local"))
    return emit


def _targets(emit: Emitter) -> list[str]:
    return [
        str(i.op) if isinstance(i, Communicate) else str(i.target).removeprefix("aten.")
        for i in emit.body
    ]


def test_a_value_in_its_own_layout_is_read_as_it_is() -> None:
    emit = _emitter((0,))
    assert emit.get(Ref("x"), (0,)) == Ref("local") and not emit.body
    assert emit.layout_of(Ref("x")) == (0,)


def test_a_layout_is_made_once_for_all_readers() -> None:
    emit = _emitter((PARTIAL,))
    first = emit.get(Ref("x"), (0,))
    count = len(emit.body)
    assert emit.get(Ref("x"), (0,)) == first and len(emit.body) == count


def test_names_are_unique_and_know_their_origin() -> None:
    emit = _emitter((0,), (2,))
    emit.origin = "mm"
    emit.get(Ref("x"), (REPLICATE,))
    emit.compute(aten.neg.default, Ref("local"))
    names = [i.name for i in emit.body]
    assert len(set(names)) == len(names)
    assert emit.body[-1].origin == "mm" and emit.body[0].origin.startswith("mm")


def test_a_gather_of_the_leading_dim_moves_no_data_around() -> None:
    emit = _emitter((0,))
    emit.get(Ref("x"), (REPLICATE,))
    assert "all_gather" in _targets(emit) and "permute.default" not in _targets(emit)


def test_a_gather_of_an_inner_dim_transposes_after_it() -> None:
    emit = _emitter((1,))
    emit.get(Ref("x"), (REPLICATE,))
    targets = _targets(emit)
    assert targets.index("permute.default") > targets.index("all_gather")


def test_a_slice_starts_at_an_offset_of_the_rank() -> None:
    emit = _emitter((REPLICATE, REPLICATE), (2, 2))
    emit.get(Ref("x"), (0, 0))
    starts = [
        i.args[2] for i in emit.body
        if isinstance(i, Compute) and i.target is torch.ops.autopar.padded_narrow.default
    ]  # fmt: skip
    assert starts == [Offset((4, 0)), Offset((0, 2))]


def test_all_reduce_over_several_axes() -> None:
    emit = _emitter((0, REPLICATE), (2, 2))
    emit.all_reduce(Ref("local"), (0, 1), "max")
    assert [(i.op, i.axis, i.reduce) for i in emit.body if isinstance(i, Communicate)] == [
        (CollectiveOp.ALL_REDUCE, 0, "max"),
        (CollectiveOp.ALL_REDUCE, 1, "max"),
    ]
