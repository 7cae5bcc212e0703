"""Which values compiled code does not hold, on small graphs by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autopar.ops  # noqa: F401  (registers autopar::sdpa)
from autopar.graph.inline import MOST_OPERATORS, MOST_READS, inlined
from autopar.graph.program import (
    Graph,
    GraphInput,
    GraphOutput,
    InputKind,
    Operator,
    OutputKind,
    Phase,
    Ref,
    TensorMeta,
)

aten, own = torch.ops.aten, torch.ops.autopar
META = TensorMeta((4, 4), torch.float32)
X, Y = Ref("x"), Ref("y")
INPUTS = tuple(GraphInput(n, InputKind.PARAMETER, META, n, n) for n in ("x", "y"))


def op(name: str, target: Any, *args: Any, layer: int = 0) -> Operator:
    return Operator(name, target, args, {}, (META,), Phase.FORWARD, layer=layer)


def found(*ops: Operator, outputs: tuple[GraphOutput, ...] = ()) -> set[str]:
    return set(inlined(Graph(INPUTS, ops, outputs, layer_names=("first", "second"))))


GATE = (
    op("gate", aten.mm.default, X, Y),
    op("up", aten.mm.default, X, Y),
    op("act", aten.silu.default, Ref("gate")),
    op("both", aten.mul.Tensor, Ref("act"), Ref("up")),
)


def test_an_activation_is_computed_in_what_reads_it() -> None:
    assert found(*GATE) == {"act", "both"}


def test_the_operand_of_a_product_is_held() -> None:
    down = op("down", aten.mm.default, Ref("both"), Y)
    assert found(*GATE, down) == {"act"}
    seen = op("seen", aten.view.default, Ref("both"), [16])
    down = op("down", aten.mm.default, Ref("seen"), Y)
    assert found(*GATE, seen, down) == {"act"}


def test_what_leaves_is_held() -> None:
    assert found(*GATE, outputs=(GraphOutput(OutputKind.SENT, Ref("both"), "both"),)) == {"act"}


def test_a_normalisation_holds_what_it_reduces() -> None:
    assert found(
        op("wide", aten._to_copy.default, X),
        op("square", aten.pow.Tensor_Scalar, Ref("wide"), 2),
        op("mean", aten.mean.dim, Ref("square"), [-1], True),
        op("scale", aten.rsqrt.default, Ref("mean")),
        op("normed", aten.mul.Tensor, Ref("wide"), Ref("scale")),
        op("weighted", aten.mul.Tensor, Ref("normed"), Y),
        op("product", aten.mm.default, Ref("weighted"), Y),
    ) == {"wide", "square", "scale", "normed"}


@pytest.mark.parametrize(("second", "copied"), [(X, True), (Y, False)])
def test_attention_copies_what_is_made_of_one_value(second: Ref, copied: bool) -> None:
    """Keys of several heads each: expanded for the call, in forward and in backward."""
    wide = op("wide", aten.add.Tensor, X, second)
    seen = op("seen", aten.view.default, Ref("wide"), [16])
    made = op("out", own.sdpa.default, Y, Ref("seen"), Y, None, True, 1.0)
    assert ("wide" in found(wide, seen, made)) is copied


def test_what_reads_too_much_is_held() -> None:
    products = [op(f"p{i}", aten.mm.default, X, Y) for i in range(MOST_READS + 1)]
    sums = [
        op(f"s{i}", aten.add.Tensor, Ref("p0" if i == 1 else f"s{i - 1}"), Ref(f"p{i}"))
        for i in range(1, MOST_READS + 1)
    ]
    assert found(*products, *sums) == {f"s{i}" for i in range(1, MOST_READS)}


def test_a_long_chain_is_held_now_and_then() -> None:
    chain = [
        op(f"c{i}", aten.neg.default, X if i == 0 else Ref(f"c{i - 1}"))
        for i in range(MOST_OPERATORS + 3)
    ]
    held = {o.name for o in chain} - found(*chain)
    assert held == {f"c{MOST_OPERATORS}"}


def test_values_of_other_layers_count_as_held() -> None:
    first = [op(f"p{i}", aten.mm.default, X, Y) for i in range(2)]
    joined = op("joined", aten.add.Tensor, Ref("p0"), Ref("p1"))
    seen = op("seen", aten.view.default, Ref("wide"), [16], layer=1)
    attend = op("out", own.sdpa.default, Y, Ref("seen"), Y, None, True, 1.0, layer=1)
    assert "wide" in found(
        *first, joined, op("wide", aten.neg.default, Ref("joined"), layer=1), seen, attend
    )
