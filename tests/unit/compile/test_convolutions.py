"""Convolutions are traced with channels last, in both directions, and each value is moved once."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.kernels import decompositions

aten = torch.ops.aten
GEOMETRY = ((1, 1), (1, 1), (1, 1), False, (0, 0))
CHANNELS = 8


def step(x: Tensor, one: Tensor, two: Tensor, groups: int = 1) -> list[Tensor]:
    """Two convolutions with a relu between, and gradients through them."""
    h = aten.convolution(x, one, None, *GEOMETRY, groups)
    y = aten.convolution(h.relu(), two, None, *GEOMETRY, groups)
    mask = [True, True, False]
    dy = 2 * y
    dr, dtwo, _ = aten.convolution_backward(dy, h.relu(), two, None, *GEOMETRY, groups, mask)
    dh = torch.where(h > 0, dr, 0)
    dx, done, _ = aten.convolution_backward(dh, x, one, None, *GEOMETRY, groups, mask)
    return [y, dx, done, dtwo]


def traced(groups: int) -> tuple[fx.GraphModule, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, CHANNELS, 6, 6, generator=generator)
    shape = (CHANNELS, CHANNELS // groups, 3, 3)
    inputs = [x, *(torch.randn(shape, generator=generator) / 9 for _ in range(2))]

    def play(*tensors: Tensor) -> list[Tensor]:
        return step(*tensors, groups)

    graph = make_fx(play, decomposition_table=decompositions([]), tracing_mode="fake")(*inputs)
    return graph, inputs, step(*inputs, groups)


def is_last(node: fx.Node) -> bool:
    value: Tensor = node.meta["val"]
    return value.is_contiguous(memory_format=torch.channels_last)


def test_operands_have_channels_last_and_values_are_those_of_before() -> None:
    graph, inputs, want = traced(groups=1)
    convolutions = [n for n in graph.graph.nodes if "convolution" in str(n.target)]
    assert len(convolutions) == 4
    assert all(is_last(operand) for n in convolutions for operand in n.all_input_nodes)
    moved = [n for n in graph.graph.nodes if n.target is aten.clone.default and is_last(n)]
    assert sorted(n.args[0].op for n in moved) == ["placeholder"] * 3  # x and the weights, once
    got = graph(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert [g.stride() for g in got[2:]] == [w.stride() for w in inputs[1:]]


def test_grouped_ones_stay_as_they_are() -> None:
    graph, inputs, want = traced(groups=2)
    assert not any(n.target is aten.clone.default for n in graph.graph.nodes)
    torch.testing.assert_close(graph(*inputs), want, rtol=1e-4, atol=1e-3)
