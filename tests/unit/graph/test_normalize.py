"""Each pass of the normal form: what it rewrites, and what it must not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.graph.capture import capture_graph
from autopar.graph.program import Graph, OutputKind, Phase
from tests.unit.graph import zoo

torch.set_num_threads(1)


def counts(graph: Graph) -> Counter[str]:
    return Counter(op.op_name.removesuffix(".default") for op in graph.operators)


def test_linear_is_matmul_and_add_without_double_transposes() -> None:
    graph = capture_graph(nn.Linear(4, 6), torch.randn(3, 4), lambda y, _: y.pow(2).sum())
    ops = counts(graph)
    assert ops["aten.addmm"] == 0 and ops["aten.mm"] == 2  # forward, weight gradient
    assert ops["aten.t"] == 2  # the weight, and the gradient of the output
    bias = next(op for op in graph.operators if op.name.endswith("_bias"))
    matmul = next(op for op in graph.operators if op.op_name == "aten.mm.default")
    assert bias.op_name == "aten.add.Tensor" and bias.operands[0].name == matmul.name


class Scaled(nn.Module):
    """addmm and baddbmm with factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).double())
        self.bias = nn.Parameter(torch.randn(4).double())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=3.0)
        wide = self.weight.expand(2, 4, 4)
        z = torch.baddbmm(self.bias, y.expand(2, 4, 4), wide, alpha=2.0)
        return torch.baddbmm(self.bias, z, wide, beta=0).pow(2).mean()


def test_alpha_and_beta_become_multiplications() -> None:
    torch.manual_seed(0)
    graph = zoo.assert_equals_eager(Scaled(), torch.randn(4, 4).double(), None, 1e-12)
    ops = counts(graph)
    assert not ops["aten.addmm"] and not ops["aten.baddbmm"]
    forward = Counter(op.op_name for op in graph.operators if op.phase is Phase.FORWARD)
    assert forward["aten.mul.Tensor"] == 3


def ignoring(logits: Tensor, batch: Any) -> Tensor:
    return functional.cross_entropy(logits, batch.long().argmax(1), ignore_index=1)


def test_mean_loss_is_sum_over_weight() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5).double()
    graph = zoo.assert_equals_eager(model, torch.randn(7, 5).double() * 3, ignoring, 1e-12)
    forward = next(op for op in graph.operators if op.op_name == "aten.nll_loss_forward.default")
    backward = next(op for op in graph.operators if op.op_name == "aten.nll_loss_backward.default")
    assert forward.args[3] == backward.args[4] == 2  # at::Reduction::Sum
    (loss,) = graph.outputs_of(OutputKind.LOSS)
    assert loss.ref.name == f"{forward.name}_mean"


def test_two_dimensional_loss() -> None:
    model = nn.Conv2d(3, 5, 1).double()

    def loss(out: Tensor, batch: Tensor) -> Tensor:
        return functional.cross_entropy(out, batch.argmax(1))

    zoo.assert_equals_eager(model, torch.randn(2, 3, 4, 4).double(), loss, 1e-12)


def test_nothing_is_unread_or_an_alias() -> None:
    for name in zoo.TRANSFORMERS:
        graph = capture_graph(*zoo.build(name))
        read = {ref.name for op in graph.operators for ref in op.operands}
        read |= {out.ref.name for out in graph.outputs}
        assert {op.name for op in graph.operators} <= read
        assert not {"aten.detach", "aten.alias", "aten.lift_fresh_copy"} & counts(graph).keys()


class Repeats(nn.Module):
    """The same cast and view twice in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.weight.double().t()) * (x @ self.weight.double().t())).sum()


def test_repeated_views_and_casts_are_made_once() -> None:
    torch.manual_seed(0)
    graph = zoo.assert_equals_eager(Repeats(), torch.randn(3, 4).double(), None, 1e-6)
    forward = Counter(op.op_name for op in graph.operators if op.phase is Phase.FORWARD)
    assert forward["aten._to_copy.default"] == 1 and forward["aten.t.default"] == 1


def test_partners_exist_and_match() -> None:
    graph = capture_graph(*zoo.build("t5"))
    by_name = {op.name: op for op in graph.operators}
    pairs = {
        "aten.embedding_dense_backward.default": "aten.embedding.default",
        "aten._softmax_backward_data.default": "aten._safe_softmax.default",
        "aten.threshold_backward.default": "aten.relu.default",
        "aten.nll_loss_backward.default": "aten.nll_loss_forward.default",
    }
    for op in graph.operators:
        if op.op_name in pairs:
            assert by_name[op.forward].op_name == pairs[op.op_name]


def test_dropout_without_probability_is_a_copy() -> None:
    torch.manual_seed(0)
    model = zoo.Mlp(p=0.0).double()
    zoo.assert_equals_eager(model, torch.randn(8, 4).double(), None, 1e-12)
