"""Masks of relus are made from what the backward of a norm reads; sums of gradients behind relus
are made once."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.kernels import decompositions
from autopar.compile.masks import remake_masks
from autopar.compile.tables import make_sums
from tests.unit.compile.inductor_memory import moved_bytes

aten = torch.ops.aten
CHANNELS = 16
SHAPE = (4, CHANNELS, 8, 8)
COUNT = 4 * 8 * 8
ONE_BYTES = 2 * COUNT * CHANNELS
GEOMETRY = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def images(*seeds: int) -> list[Tensor]:
    made = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return [m.bfloat16().contiguous(memory_format=torch.channels_last) for m in made]


def traced(play: object, *inputs: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        module: fx.GraphModule = make_fx(
            play,  # type: ignore[arg-type]
            decomposition_table=decompositions([]),
            tracing_mode="fake",
        )(*inputs)
    module.graph.eliminate_dead_code()
    return module


def norm_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor) -> list[Tensor]:
    """As `lowering.composites.batch_norm` has it, for a norm that divides by nothing."""
    dy, centred = dy.float(), x.float() - mean
    db, dw = dy.sum((0, 2, 3), keepdim=True), (dy * centred).sum((0, 2, 3), keepdim=True)
    return [(scale * (dy - db / COUNT - centred * dw / COUNT)).bfloat16(), db, dw]


def relu_of_norm(x: Tensor, weight: Tensor, scale: Tensor, mean: Tensor) -> list[Tensor]:
    """conv, norm, relu, conv, and backward of the middle two."""
    h = aten.convolution(x, weight, None, *GEOMETRY)
    r = ((h.float() - mean) * scale).bfloat16().relu()
    y = aten.convolution(r, weight, None, *GEOMETRY)
    dr = aten.convolution(y, weight, None, *GEOMETRY)
    return [r, y, *norm_backward(aten.threshold_backward(dr, r, 0), h, scale, mean)]


def inputs() -> tuple[Tensor, ...]:
    (x,) = images(0)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, generator=generator).bfloat16() / 4
    weight = weight.contiguous(memory_format=torch.channels_last)
    vectors = torch.randn(2, 1, CHANNELS, 1, 1, generator=generator)
    return x, weight, vectors[0], vectors[1]


def test_the_result_of_a_relu_is_not_read_for_its_mask() -> None:
    given = inputs()
    before, after = traced(relu_of_norm, *given), remake_masks(traced(relu_of_norm, *given))
    after.graph.lint()
    relu = after.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    assert aten.le.Scalar not in [user.target for user in relu.users]
    for got, want in zip(after(*given), before(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    saved = moved_bytes(before) - moved_bytes(after)
    assert saved == ONE_BYTES  # by one kernel; on GPUs, which split long sums, by two


def test_a_mask_stays_where_its_source_is_not_read_in_backward() -> None:
    def play(x: Tensor, weight: Tensor) -> list[Tensor]:
        r = aten.convolution(x, weight, None, *GEOMETRY).relu()
        y = aten.convolution(r, weight, None, *GEOMETRY)
        return [r, aten.threshold_backward(y, r, 0)]

    module = remake_masks(traced(play, *inputs()[:2]))
    assert len(module.graph.find_nodes(op="call_function", target=aten.relu.default)) == 1


def test_a_mask_of_a_sum_of_two_stays() -> None:
    """It would be made of both."""

    def play(x: Tensor, z: Tensor, g: Tensor) -> list[Tensor]:
        r = (x + z).relu()
        return [r, aten.threshold_backward(g, r, 0) * x * z]

    module = remake_masks(traced(play, *images(0, 1, 2)))
    assert len(module.graph.find_nodes(op="call_function", target=aten.relu.default)) == 1


def residual(r: Tensor, weight: Tensor, one: Tensor, two: Tensor, x: Tensor) -> list[Tensor]:
    """Backward of two blocks whose results are sums behind a relu."""
    mean, scale = torch.zeros(1, CHANNELS, 1, 1), torch.ones(1, CHANNELS, 1, 1)
    found = []
    for _ in range(2):
        dy = aten.threshold_backward(one + two, r, 0)
        dx, db, dw = norm_backward(dy, x, scale, mean)
        found += [db, dw]
        one, two = aten.convolution(dx, weight, None, *GEOMETRY), dy
    return [*found, one + two]


def test_a_sum_of_gradients_behind_a_relu_is_made_once() -> None:
    weight = inputs()[1]
    r, one, two, x = images(0, 1, 2, 3)
    given = (r.relu(), weight, one, two, x)
    before, after = traced(residual, *given), make_sums(traced(residual, *given))
    made = after.graph.find_nodes(op="call_function", target=aten.as_strided.default)
    assert [node.args[0].target for node in made] == [aten.where.self] * 2
    for got, want in zip(after(*given), before(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert moved_bytes(after) < moved_bytes(before)
