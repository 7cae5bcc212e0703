"""Activations in the products before them: where they are joined, and that values stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autopar.compile import kernels
from autopar.compile.epilogues import join_activations
from autopar.compile.inductor import compile_module
from autopar.compile.passes import prepare
from autopar.compile.trace import trace
from autopar.graph.program import Ref
from autopar.lowering.program import Compute, LocalProgram
from tests.programs import call, played, port, targets

aten, own = torch.ops.aten, torch.ops.autopar
GELU, GRADIENT = aten.gelu.default, aten.gelu_backward.default
JOINED, JOINED_GRADIENT = own.linear_gelu.default, own.gelu_gradient.default
BATCH, LENGTH, WIDTH, HIDDEN = 2, 3, 4, 8
ROWS, SHAPE = BATCH * LENGTH, (BATCH, LENGTH, HIDDEN)


def mlp(approximate: str = "tanh", **changed: tuple[Compute, ...]) -> LocalProgram:
    """gelu(x @ up^T + bias) @ down^T, and gradients by what it is made of, as a step has them.
    changed: what stands in the place of an instruction."""
    body = (
        call("up_t", aten.t.default, Ref("up")),
        call("product", aten.mm.default, Ref("x"), Ref("up_t")),
        call("sum", aten.add.Tensor, Ref("product"), Ref("bias")),
        call("shaped", aten.reshape.default, Ref("sum"), list(SHAPE)),
        call("gelu", GELU, Ref("shaped"), approximate=approximate),
        call("rows", aten.reshape.default, Ref("gelu"), [ROWS, HIDDEN]),
        call("down_t", aten.t.default, Ref("down")),
        call("out", aten.mm.default, Ref("rows"), Ref("down_t")),
        call("dh", aten.mm.default, Ref("dout"), Ref("down")),
        call("dshaped", aten.reshape.default, Ref("dh"), list(SHAPE)),
        call("again", aten.reshape.default, Ref("sum"), list(SHAPE)),
        call("dgelu", GRADIENT, Ref("dshaped"), Ref("again"), approximate=approximate),
        call("drows", aten.reshape.default, Ref("dgelu"), [ROWS, HIDDEN]),
        call("dbias", aten.sum.dim_IntList, Ref("drows"), [0]),
        call("dx", aten.mm.default, Ref("drows"), Ref("up")),
    )
    inputs = {
        "x": port("x", ROWS, WIDTH),
        "up": port("up", HIDDEN, WIDTH),
        "bias": port("bias", HIDDEN),
        "down": port("down", WIDTH, HIDDEN),
        "dout": port("dout", ROWS, WIDTH),
    }
    outputs = {
        "out": port("out", ROWS, WIDTH),
        "dbias": port("dbias", HIDDEN),
        "dx": port("dx", ROWS, WIDTH),
    }
    return LocalProgram(
        inputs, tuple(new for i in body for new in changed.get(i.name, (i,))), outputs, {}
    )


def values(program: LocalProgram) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ports = program.inputs.items()
    return {name: torch.randn(p.meta.shape, generator=generator) for name, p in ports}


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


def test_a_gelu_and_its_gradient_are_joined() -> None:
    program = mlp()
    joined = join_activations(program)
    assert {JOINED, JOINED_GRADIENT} <= {*targets(joined)}
    assert not {GELU, GRADIENT} & {*targets(joined)}
    given = values(program)
    assert_same(played(joined, given), played(program, given))


def test_a_gelu_in_the_shape_of_its_sum_is_joined() -> None:
    program = mlp(gelu=(call("gelu", GELU, Ref("sum"), approximate="tanh"),))
    joined = join_activations(program)
    assert JOINED in targets(joined) and GELU not in targets(joined)
    given = values(program)
    assert_same(played(joined, given), played(program, given))


def test_a_dead_gelu_does_not_take_the_product() -> None:
    program = mlp()
    dead = call("dead", GELU, Ref("shaped"), approximate="tanh")
    body = (*program.body[:4], dead, *program.body[4:])
    joined = join_activations(replace(program, body=body))
    assert [i.name for i in joined.body if getattr(i, "target", None) is GELU] == ["dead"]


def test_a_gelu_that_is_made_again_stays_one() -> None:
    """It was to be made of what is saved."""
    program = mlp()
    again = call("gelu_again", GELU, Ref("again"), approximate="tanh")
    saved = {"again": port("gelu_again", *SHAPE)}
    program = replace(program, body=(*program.body, again), outputs={**program.outputs, **saved})
    joined = join_activations(program)
    assert targets(joined).count(JOINED) == targets(joined).count(GELU) == 1
    given = values(program)
    assert_same(played(joined, given), played(program, given))


@pytest.mark.parametrize("gelu_first", [False, True])
def test_what_is_made_anew_for_a_gradient_is_joined(gelu_first: bool) -> None:
    """The sum, for its slope, after the product of the gradient; and its GELU."""
    anew = [
        call("product2", aten.mm.default, Ref("x"), Ref("up_t")),
        call("sum2", aten.add.Tensor, Ref("product2"), Ref("bias")),
        call("again", aten.reshape.default, Ref("sum2"), list(SHAPE)),
    ]
    gelu = call("gelu2", GELU, Ref("again"), approximate="tanh")
    dgelu = call("dgelu", GRADIENT, Ref("dshaped"), Ref("again"), approximate="tanh")
    last = (gelu, dgelu) if gelu_first else (dgelu, gelu)
    program = mlp(again=tuple(anew), dgelu=last)
    program = replace(program, outputs={**program.outputs, "gelu2": port("gelu2", *SHAPE)})
    joined = join_activations(program)
    assert targets(joined).count(JOINED) == 2 and targets(joined).count(JOINED_GRADIENT) == 1
    given = values(program)
    assert_same(played(joined, given), played(program, given))


def test_a_product_stays_where_it_was() -> None:
    """Later it would hold its weight, and what comes in the weight's memory, for longer."""
    beside = call("beside", aten.mm.default, Ref("x"), Ref("up_t"))
    dh = call("dh", aten.mm.default, Ref("dout"), Ref("down"))
    program = mlp(dh=(dh, beside))
    joined = join_activations(program).body
    names = [i.target for i in joined if isinstance(i, Compute)]
    position = [i.name for i in joined].index("beside")
    assert names[position - 1] is JOINED_GRADIENT
    assert_same(
        played(join_activations(program), values(program)), played(program, values(program))
    )


@pytest.mark.parametrize(
    ("program", "stays"),
    [
        pytest.param(mlp("none"), {GELU, GRADIENT}, id="the other formula"),
        pytest.param(
            mlp(sum=(call("sum", aten.add.Tensor, Ref("product"), Ref("bias"), alpha=2),)),
            {GELU},
            id="a bias that is scaled",
        ),
        pytest.param(
            mlp(sum=(call("sum", aten.add.Tensor, Ref("product"), 1.0),)), {GELU}, id="a number"
        ),
        pytest.param(
            mlp(
                product=(
                    call("flat", aten.mm.default, Ref("x"), Ref("up_t")),
                    call("product", aten._unsafe_view.default, Ref("flat"), list(SHAPE)),
                )
            ),
            {GELU},
            id="a sum in another shape",
        ),
        pytest.param(
            replace(mlp(), outputs={**mlp().outputs, "read": port("product", ROWS, HIDDEN)}),
            {GELU},
            id="a product that somebody else reads",
        ),
        pytest.param(
            replace(mlp(), outputs={**mlp().outputs, "read": port("dshaped", *SHAPE)}),
            {GRADIENT},
            id="a gradient that somebody else reads",
        ),
    ],
)
def test_what_is_no_epilogue_stays(program: LocalProgram, stays: set[object]) -> None:
    joined = join_activations(program)
    assert {GELU, GRADIENT} & {*targets(joined)} == stays
    given = values(program)
    assert_same(played(joined, given), played(program, given))


@pytest.mark.parametrize("has_kernel", [False, True])
def test_it_compiles(has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As operators where a device has kernels, taken apart elsewhere."""
    for name in ("linear_gelu_problem", "gelu_gradient_problem"):
        monkeypatch.setattr(kernels, name, lambda *_: object() if has_kernel else None)
    program = mlp()
    given = values(program)
    want = played(program, given)
    traced = trace(program, [*given.values()], coordinates=(), groups=())
    found = {node.target for node in traced.graph.nodes} & {JOINED, JOINED_GRADIENT}
    assert found == ({JOINED, JOINED_GRADIENT} if has_kernel else set())
    compiled = compile_module(prepare(traced, []))
    assert_same(list(compiled.call([*given.values()])), want)


def test_a_factor_of_a_bias_is_kept() -> None:
    """Inductor has a product of matrices with a bias, which knows of none."""
    scaled = call("sum", aten.add.Tensor, Ref("product"), Ref("bias"), alpha=2)
    program = mlp(sum=(scaled,))
    given = values(program)
    traced = trace(program, [*given.values()], coordinates=(), groups=())
    compiled = compile_module(prepare(traced, []))
    assert_same(list(compiled.call([*given.values()])), played(program, given))
