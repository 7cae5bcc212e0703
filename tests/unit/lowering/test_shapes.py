"""The shape verifier accepts what the lowering makes and refuses what it would never make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autopar.errors import InternalError
from autopar.graph.program import Ref, TensorMeta
from autopar.lowering.program import CollectiveOp, Communicate, Compute, LocalProgram, Port
from autopar.lowering.shapes import check_shapes

aten = torch.ops.aten
META = TensorMeta((8, 6), torch.float32)
DIMS = ((8,), (6,))


def program(body: list[Compute | Communicate], layout: tuple[int, ...], out: str) -> LocalProgram:
    return LocalProgram(
        {"x": Port(Ref("x"), META, DIMS, (0,))},
        tuple(body),
        {"y": Port(Ref(out), META, DIMS, layout)},
        {},
    )


def test_layouts_that_agree() -> None:
    neg = Compute("neg", aten.neg.default, (Ref("x"),), {})
    gather = Communicate("gather", CollectiveOp.ALL_GATHER, Ref("neg"), 0)
    check_shapes(program([neg], (0,), "neg"), {Ref("neg"): (4, 6)}, (2,))
    check_shapes(program([neg, gather], (-1,), "gather"), {}, (2,))


def test_an_output_in_another_layout_than_it_says() -> None:
    neg = Compute("neg", aten.neg.default, (Ref("x"),), {})
    with pytest.raises(InternalError, match=r"output 'y' has local shape \(4, 6\).*\(8, 6\)"):
        check_shapes(program([neg], (-1,), "neg"), {}, (2,))
    with pytest.raises(InternalError, match="its layout says"):
        check_shapes(program([neg], (0,), "neg"), {Ref("neg"): (8, 3)}, (2,))


def test_a_call_that_keeps_global_sizes() -> None:
    view = Compute("view", aten.reshape.default, (Ref("x"), [48]), {}, "view_0")
    with pytest.raises(InternalError, match="lowered from view_0, does not run on local shapes"):
        check_shapes(program([view], (0,), "view"), {}, (2,))


def test_a_split_that_does_not_divide_and_a_wrong_dtype() -> None:
    scatter = Communicate("scatter", CollectiveOp.REDUCE_SCATTER, Ref("x"), 0)
    with pytest.raises(InternalError, match="splits 4 rows among 3 ranks"):
        odd = program([scatter], (0,), "scatter")
        ports = {"x": replace(odd.inputs["x"], meta=META, dims=((12,), (6,)))}
        check_shapes(replace(odd, inputs=ports), {}, (3,))
    cast = Compute("cast", aten._to_copy.default, (Ref("x"),), {"dtype": torch.float64})
    with pytest.raises(InternalError, match=r"is torch.float64, expected torch.float32"):
        check_shapes(program([cast], (0,), "cast"), {}, (2,))
