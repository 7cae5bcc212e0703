"""A loss and its gradient in one operator: where they are joined, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile import alignment, kernels, losses
from autopar.compile.inductor import compile_module
from autopar.compile.kernels import decompositions
from autopar.compile.losses import align_scores, join_losses, overwrite_scores
from autopar.compile.passes import prepare
from autopar.compile.trace import trace
from autopar.graph.program import Ref
from autopar.lowering.program import LocalProgram
from tests.programs import call, played, port, targets

aten, own = torch.ops.aten, torch.ops.autopar
ROWS, ROWS_IN_PLACE = own.cross_entropy_rows.default, own.cross_entropy_rows_.default
BACKWARD = own.cross_entropy_backward.default
BACKWARD_IN_PLACE = own.cross_entropy_backward_.default
ROWS_N, WIDTH, CLASSES, IGNORED = 6, 4, 8, -100


def step(*, first: int = 0, scaled: str = "f.1") -> LocalProgram:
    """loss = sum / rows and its gradient by h, with views of h made twice, as recomputing does.
    scaled: what the tangent is divided by."""
    name, _, index = scaled.partition(".")
    body = (
        call("x", aten.reshape.default, Ref("h"), [ROWS_N, CLASSES]),
        call("t", aten.reshape.default, Ref("target"), [ROWS_N]),
        call("f", own.cross_entropy.default, Ref("x"), Ref("t"), IGNORED),
        call("loss", aten.div.Tensor, Ref("f", 0), Ref("f", 1)),
        call("g", aten.div.Tensor, Ref("tangent"), Ref(name, int(index or 0))),
        call("again", aten.reshape.default, Ref("h"), [2, ROWS_N // 2, CLASSES]),
        call("x2", aten.reshape.default, Ref("again"), [ROWS_N, CLASSES]),
        call("t2", aten.reshape.default, Ref("target"), [ROWS_N]),
        call(
            "b",
            own.cross_entropy_backward.default,
            Ref("g"),
            Ref("x2"),
            Ref("t2"),
            Ref("f", 2),
            IGNORED,
            first,
        ),
    )
    inputs = {
        "h": port("h", 2, ROWS_N // 2, CLASSES),
        "target": port("target", 2, ROWS_N // 2, dtype=torch.int64),
        "tangent": port("tangent"),
    }
    outputs = {"loss": port("loss"), "dx": replace(port("b", ROWS_N, CLASSES))}
    return LocalProgram(inputs, body, outputs, {})


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (2, ROWS_N // 2), generator=generator)
    target[0, 1] = IGNORED
    scores = torch.randn(2, ROWS_N // 2, CLASSES, generator=generator)
    return {"h": scores, "target": target, "tangent": torch.tensor(0.5)}


def test_a_loss_is_joined_with_its_gradient() -> None:
    program = step()
    joined = join_losses(program)
    assert ROWS in targets(joined)
    assert not {own.cross_entropy.default, own.cross_entropy_backward.default} & {*targets(joined)}
    for got, want in zip(played(joined, values()), played(program, values()), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(step(first=4), id="a shard of the classes"),
        pytest.param(step(scaled="loss"), id="a gradient that needs the loss"),
        pytest.param(
            replace(step(), outputs={**step().outputs, "lse": replace(port("f"), ref=Ref("f", 2))}),
            id="normalizers that somebody else reads",
        ),
    ],
)
def test_what_needs_both_stays(program: LocalProgram) -> None:
    assert join_losses(program) is program


def graph_of(body: Callable[..., list[Tensor]], *examples: Tensor) -> fx.GraphModule:
    """With our operators as they are, as on GPUs."""
    ours = {ROWS, BACKWARD, own.softmax_sums.default}
    table = {target: body for target, body in decompositions([]).items() if target not in ours}
    graph: fx.GraphModule = make_fx(body, decomposition_table=table, tracing_mode="fake")(*examples)
    return graph


def last_layer(
    hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Scores; loss, gradients by hidden and weight."""
    scores = (hidden @ weight).view(2, ROWS_N // 2, CLASSES).view(ROWS_N, CLASSES)
    losses, dx = own.cross_entropy_rows(grad, scores, target, IGNORED)
    return scores, [losses.sum(), dx @ weight.t(), hidden.t() @ dx]


def sharded(hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor) -> list[Tensor]:
    """As where the classes are sharded; the loss is summed after the gradient was made."""
    scores = hidden @ weight
    top, total = own.softmax_sums(scores.view(ROWS_N, CLASSES))
    lse = (total.log() + top).squeeze(1)
    picked = scores.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    dx = own.cross_entropy_backward(grad, scores, target, lse, IGNORED, 0)
    return [(lse - picked).sum(), dx @ weight.t(), hidden.t() @ dx]


def examples() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS_N, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, CLASSES, generator=generator)
    target = torch.tensor([0, 3, IGNORED, 7, 1, 1])
    return hidden, weight, target, torch.tensor(0.25)


@pytest.mark.parametrize("body", [lambda *args: last_layer(*args)[1], sharded])
def test_gradients_take_the_memory_of_scores(
    body: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what Inductor makes of it."""
    monkeypatch.setattr(losses, "_MUCH", 1)
    want = body(*examples())
    graph = overwrite_scores(graph_of(body, *examples()))
    targets = [node.target for node in graph.graph.nodes]
    assert {ROWS_IN_PLACE, BACKWARD_IN_PLACE} & {*targets} and not {ROWS, BACKWARD} & {*targets}
    for got, expected in zip(graph(*examples()), want, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(compile_module(graph).call([*examples()]), want, strict=True):
        torch.testing.assert_close(got, expected)


def read_later(*args: Tensor) -> list[Tensor]:
    scores, found = last_layer(*args)
    return [*found, scores.amax(1)]


def summed_later(*args: Tensor) -> list[Tensor]:
    scores, found = last_layer(*args)
    return [*found, *own.softmax_sums(scores)]


def much_is_made(hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor) -> list[Tensor]:
    scores = hidden @ weight
    exp = scores.exp()
    _, dx = own.cross_entropy_rows(grad, scores, target, IGNORED)
    return [exp, dx @ weight.t()]


def given(_hidden: Tensor, _weight: Tensor, target: Tensor, grad: Tensor) -> list[Tensor]:
    return list(own.cross_entropy_rows(grad, grad.new_ones(ROWS_N, CLASSES), target, IGNORED))


@pytest.mark.parametrize("body", [read_later, summed_later, much_is_made, given])
def test_scores_that_something_else_reads_stay(body: Callable[..., list[Tensor]]) -> None:
    graph = overwrite_scores(graph_of(body, *examples()))
    assert not graph.graph.find_nodes(op="call_function", target=ROWS_IN_PLACE)


# ---- scores whose rows are not aligned


ODD_ROWS, VOCABULARY = 8, 13


def odd_step() -> LocalProgram:
    """A last layer over a vocabulary of an odd size, and its gradients."""
    body = (
        call("w", aten.t.default, Ref("weight")),
        call("scores", aten.mm.default, Ref("h"), Ref("w")),
        call("shaped", aten.reshape.default, Ref("scores"), [2, ODD_ROWS // 2, VOCABULARY]),
        call("x", aten.reshape.default, Ref("shaped"), [ODD_ROWS, VOCABULARY]),
        call("dead", aten.reshape.default, Ref("scores"), [2, ODD_ROWS // 2, VOCABULARY]),
        call("f", ROWS, Ref("tangent"), Ref("x"), Ref("target"), IGNORED),
        call("loss", aten.sum.default, Ref("f", 0)),
        call("dshaped", aten.reshape.default, Ref("f", 1), [2, ODD_ROWS // 2, VOCABULARY]),
        call("dx", aten.reshape.default, Ref("dshaped"), [ODD_ROWS, VOCABULARY]),
        call("dh", aten.mm.default, Ref("dx"), Ref("weight")),
        call("dx_t", aten.t.default, Ref("dx")),
        call("dw", aten.mm.default, Ref("dx_t"), Ref("h")),
    )
    inputs = {
        "h": port("h", ODD_ROWS, WIDTH),
        "weight": port("weight", VOCABULARY, WIDTH),
        "target": port("target", ODD_ROWS, dtype=torch.int64),
        "tangent": port("tangent"),
    }
    names = ("loss", (1,)), ("dh", (ODD_ROWS, WIDTH)), ("dw", (VOCABULARY, WIDTH))
    return LocalProgram(inputs, body, {name: port(name, *shape) for name, shape in names}, {})


def odd_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "h": torch.randn(ODD_ROWS, WIDTH, generator=generator),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
        "target": torch.tensor([0, 12, IGNORED, 7, 1, 1, 3, 12]),
        "tangent": torch.tensor(0.25),
    }


@pytest.fixture
def kernels_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are aligned have a kernel, as on GPUs; products are large."""
    monkeypatch.setattr(kernels, "has_kernel_for_rows", lambda x: x.stride(0) * 4 % 16 == 0)
    monkeypatch.setattr(alignment, "SMALL_PRODUCT", 1)


@pytest.mark.usefixtures("kernels_for_rows")
def test_odd_scores_are_aligned_and_overwritten() -> None:
    """No copy is made of the gradient, though each product that reads it wants it padded."""
    program = odd_step()
    want = played(program, odd_values())
    graph = prepare(trace(program, [*odd_values().values()], coordinates=(), groups=()), [])
    (written,) = graph.graph.find_nodes(op="call_function", target=ROWS_IN_PLACE)
    assert written.args[1].meta["val"].stride() == (32, 1)
    pads = graph.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
    assert [tuple(pad.meta["val"].shape) for pad in pads] == [(32, WIDTH)]  # the weight
    for got, expected in zip(graph(*odd_values().values()), want, strict=True):
        torch.testing.assert_close(got, expected)
    compiled = compile_module(graph)
    for got, expected in zip(compiled.call([*odd_values().values()]), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("read", ["scores", "shaped", "x"])
def test_odd_scores_that_something_else_reads_stay(read: str) -> None:
    program = odd_step()
    assert own.aligned_product.default in targets(align_scores(program))
    outputs = {**program.outputs, "read": port(read, ODD_ROWS, VOCABULARY)}
    assert own.aligned_product.default not in targets(
        align_scores(replace(program, outputs=outputs))
    )
