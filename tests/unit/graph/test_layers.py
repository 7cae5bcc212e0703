"""Layers follow the blocks of a model; cuts are balanced; equal blocks are of one class."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import InternalError, OptionError
from autopar.graph.capture import capture_graph
from autopar.graph.layers import block_of, check_layers, cluster_layers, layer_classes
from autopar.graph.program import Graph, Phase
from autopar.graph.work import operator_bytes, operator_flops
from tests.unit.graph import zoo

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
@pytest.mark.parametrize("training", [False, True])
def test_inner_blocks_are_one_class(name: str, training: bool) -> None:
    model, batch = zoo.build(name, torch.float32, layers=4)
    graph = cluster_layers(capture_graph(model.train(training), batch))
    assert len(graph.layer_names) == 6
    assert layer_classes(graph) == (0, 1, 1, 1, 1, 2)


def test_encoder_decoder() -> None:
    graph = cluster_layers(capture_graph(*zoo.build("t5", layers=4)))
    names = graph.layer_names
    assert names[0] == "first" and names[5] == "between" and names[-1] == "last"
    assert names[1:5] == tuple(f"encoder.block.{i}" for i in range(4))
    classes = layer_classes(graph)
    assert classes[2] == classes[3] and classes[7] == classes[8]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_any_number_of_layers(name: str, num_layers: int) -> None:
    graph = cluster_layers(capture_graph(*zoo.build(name)), num_layers)
    assert len(graph.layer_names) == num_layers


@pytest.mark.parametrize("num_layers", [None, 1, 2, 5])
def test_skip_edges_and_tied_weights(num_layers: int | None) -> None:
    unet = capture_graph(zoo.UNet(), torch.randn(2, 3, 8, 8))
    tied = capture_graph(zoo.TiedLoop(p=0.1), zoo.tokens(), zoo.next_token_loss)
    for graph in (unet, tied):
        clustered = cluster_layers(graph, num_layers)
        assert num_layers is None or len(clustered.layer_names) == num_layers


class Stack(nn.Module):
    """Equal linears in a row, without a ModuleList."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        for index, (a, b) in enumerate(pairs):
            setattr(self, f"linear{'abcdefgh'[index]}", nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).relu()
        return x.mean()


def work(graph: Graph, layer: int) -> float:
    metas = graph.metas()
    ops = [op for op in graph.operators if op.layer == layer and op.phase is Phase.FORWARD]
    return sum(operator_flops(op, metas) for op in ops)


def test_balanced_cuts_share_the_work() -> None:
    graph = capture_graph(Stack([64] * 9), torch.randn(128, 64))
    clustered = cluster_layers(graph, 4)
    assert [work(clustered, layer) for layer in range(4)] == [2 * 2 * 128 * 64 * 64] * 4


def test_cuts_prefer_narrow_values() -> None:
    """Widths 64, 512, 64, 512, 64: of equal layers the cheap cut is after the second linear."""
    graph = cluster_layers(capture_graph(Stack([64, 512, 64, 512, 64]), torch.randn(32, 64)), 2)
    layer_of = {op.name: op.layer for op in graph.operators if op.phase is Phase.FORWARD}
    metas = graph.metas()
    crossing = {
        metas[ref].shape
        for op in graph.operators
        for ref in op.operands
        if layer_of.get(op.name) == 1 and layer_of.get(ref.name) == 0
    }
    assert crossing == {(32, 64)}


def test_activations_of_a_sequential_are_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU())
    graph = cluster_layers(capture_graph(model, torch.randn(2, 4), lambda y, _: y.mean()))
    assert graph.layer_names == ("0", "2", "last")


class Shared(nn.Module):
    """Two blocks, run over three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for block in self.blocks:
                x = x + block(x)
        return x.mean()


def test_repeated_calls_are_layers_of_one_class() -> None:
    graph = cluster_layers(capture_graph(Shared(), torch.randn(2, 4)))
    assert graph.layer_names[:6] == (
        "blocks.0",
        "blocks.1",
        "blocks.0@1",
        "blocks.1@1",
        "blocks.0@2",
        "blocks.1@2",
    )


def test_block_of() -> None:
    assert block_of("transformer.h.3.attn") == ("transformer.h", "3")
    assert block_of("blocks.1@2.0") == ("blocks", "1@2")
    assert block_of("0") == ("", "0")
    assert block_of("encoder.conv1") is None


def test_operator_sizes() -> None:
    graph = capture_graph(nn.Linear(8, 16), torch.randn(4, 8), lambda y, _: y.sum())
    metas = graph.metas()
    matmul = next(op for op in graph.operators if op.op_name == "aten.mm.default")
    transpose = next(op for op in graph.operators if op.op_name == "aten.t.default")
    assert operator_flops(matmul, metas) == 2 * 4 * 8 * 16
    assert operator_bytes(matmul, metas) == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert operator_flops(transpose, metas) == operator_bytes(transpose, metas) == 0


def test_verifier_and_options_refuse() -> None:
    graph = cluster_layers(capture_graph(*zoo.build("gpt2")))
    moved = tuple(
        replace(op, layer=3 - op.layer) if op.phase is Phase.BACKWARD else op
        for op in graph.operators
    )
    with pytest.raises(InternalError, match="layer"):
        check_layers(graph.with_operators(moved))
    with pytest.raises(OptionError, match="num_layers"):
        cluster_layers(graph, 0)


def grouped(linear: nn.Linear, x: Tensor) -> Tensor:
    """Two experts of equal shapes, 8 tokens each."""
    ends = torch.tensor([8, 16], dtype=torch.int32)
    weights = torch.stack([linear.weight, linear.weight * 2])
    return torch._grouped_mm(x, weights.transpose(-2, -1), offs=ends)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return grouped(self.linear, x).float().mean()


def test_grouped_matmuls_have_flops() -> None:
    graph = capture_graph(Experts().bfloat16(), torch.randn(16, 16).bfloat16())
    metas = graph.metas()
    flops = [operator_flops(op, metas) for op in graph.operators if "grouped" in op.op_name]
    assert flops == [2 * 16 * 16 * 32] * 2  # forward and weight gradient
