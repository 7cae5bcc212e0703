"""Losses under a narrow precision: in float32, of scores that nobody widens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.graph.capture import capture_graph
from autopar.graph.precision import Precision
from autopar.graph.program import Graph, OutputKind

TOKENS, WIDTH, CLASSES = 6, 8, 32


class Scores(nn.Module):
    """A table of scores, and what a loss function makes of it."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(WIDTH, CLASSES), loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(x), target)


def captured(loss: Callable[[Tensor, Tensor], Tensor], precision: str = "bf16") -> Graph:
    torch.manual_seed(0)
    batch = (torch.randn(2, TOKENS, WIDTH), torch.randint(0, CLASSES, (2, TOKENS)))
    return capture_graph(Scores(loss), batch, precision=Precision.parse(precision))


def loss_type(graph: Graph) -> torch.dtype:
    (loss,) = graph.outputs_of(OutputKind.LOSS)
    return graph.metas()[loss.ref].dtype


def wide_tables(graph: Graph) -> list[str]:
    metas = graph.metas().items()
    size = 2 * TOKENS * CLASSES
    return [str(r) for r, m in metas if m.numel == size and m.dtype is torch.float32]


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: functional.cross_entropy(x.flatten(0, 1), t.flatten()),
        lambda x, t: functional.cross_entropy(x.float().view(-1, CLASSES), t.view(-1)),
        lambda x, t: nn.CrossEntropyLoss(reduction="sum")(x.view(-1, CLASSES), t.view(-1)) / 12,
    ],
    ids=["narrow scores", "widened by the model", "a module"],
)
def test_cross_entropy_reads_narrow_scores(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = captured(loss)
    assert loss_type(graph) is torch.float32
    assert wide_tables(graph) == []
    targets = [op.op_name for op in graph.operators]
    assert targets.count("autopar.cross_entropy.default") == 1
    assert targets.count("autopar.cross_entropy_backward.default") == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: functional.mse_loss(x.sum(-1), t.to(x.dtype)),
        lambda x, t: functional.nll_loss(functional.log_softmax(x.view(-1, 32), -1), t.view(-1)),
        lambda x, t: functional.cross_entropy(x.view(-1, 32), t.view(-1), label_smoothing=0.1),
        lambda x, t: functional.cross_entropy(x.movedim(-1, 1), t),
    ],
    ids=["squares", "two steps", "smoothed", "classes in the middle"],
)
def test_other_losses_are_wide_too(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert loss_type(captured(loss)) is torch.float32


@pytest.mark.parametrize("precision", ["model", "fp32"])
def test_other_precisions_have_torchs_own(precision: str) -> None:
    graph = captured(lambda x, t: functional.cross_entropy(x.flatten(0, 1), t.flatten()), precision)
    assert "aten._log_softmax.default" in {op.op_name for op in graph.operators}
    assert not hasattr(functional.cross_entropy, "__wrapped__")
    assert functional.cross_entropy.__module__ == "torch.nn.functional"
