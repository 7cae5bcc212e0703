"""Random operators of a model: what they become, and that they are what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from autopar.errors import CaptureError
from autopar.graph.capture import capture_graph
from autopar.graph.execute import graph_inputs, run_graph
from autopar.graph.program import Graph, InputKind

ROWS, COLS = 64, 512
PLACES = (torch.arange(COLS) + 0.5) / COLS


class Noisy(nn.Module):
    """Its loss is a weight times what a test draws, so that the loss and the weight's gradient are
    the sample's mean."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return (self.draw(x).double() * self.weight).mean()


def like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# what is drawn, given zeros -> its mean and standard deviation
DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "rand": (lambda x: torch.rand(ROWS, COLS), 0.5, 12**-0.5),
    "rand_like": (lambda x: torch.rand_like(x, dtype=torch.float64), 0.5, 12**-0.5),
    "randn": (lambda x: torch.randn(ROWS, COLS), 0, 1),
    "randn_like": (lambda x: torch.randn_like(x), 0, 1),
    "randint": (lambda x: torch.randint(5, (ROWS, COLS)), 2, 2**0.5),
    "randint.low": (lambda x: torch.randint(-5, 6, (ROWS, COLS)), 0, 10**0.5),
    "randint_like": (lambda x: torch.randint_like(x, 5), 2, 2**0.5),
    "randint_like.low": (lambda x: torch.randint_like(x, 2, 7), 4, 2**0.5),
    "random_": (lambda x: like(x).random_(5), 2, 2**0.5),
    "normal": (lambda x: torch.normal(3.0, 2.0, (ROWS, COLS)), 3, 2),
    "normal.mean": (lambda x: torch.normal(x + 3, 2.0), 3, 2),
    "normal.std": (lambda x: torch.normal(3.0, x + 2), 3, 2),
    "normal.both": (lambda x: torch.normal(x + 3, x[:1] + 2), 3, 2),
    "normal_": (lambda x: like(x).normal_(3, 2), 3, 2),
    "uniform_": (lambda x: like(x).uniform_(-1, 3), 1, 4 * 12**-0.5),
    "bernoulli": (lambda x: torch.bernoulli(x + 0.3), 0.3, 0.21**0.5),
    "bernoulli_": (lambda x: like(x).bernoulli_(0.3), 0.3, 0.21**0.5),
    "bernoulli_.tensor": (lambda x: like(x).bernoulli_(x + 0.3), 0.3, 0.21**0.5),
    "exponential_": (lambda x: like(x).exponential_(2.0), 0.5, 0.5),
    "gumbel": (lambda x: -like(x).exponential_().log(), 0.5772156649, math.pi / 6**0.5),
    "gumbel_softmax": (lambda x: functional.gumbel_softmax(x, hard=True) @ PLACES, 0.5, 12**-0.5),
    "rrelu": (lambda x: functional.rrelu(x - 1, 0.2, 0.6, training=True), -0.4, 0.4 * 12**-0.5),
    "dropout2d": (lambda x: functional.dropout2d((x + 1)[..., None, None], 0.4), 1, (2 / 3) ** 0.5),
    "alpha_dropout": (lambda x: functional.alpha_dropout(torch.randn_like(x), 0.3), 0, 1),
    "distribution": (lambda x: Normal(x + 3, x + 2).rsample(), 3, 2),
}  # fmt: skip


def captured(draw: Callable[[Tensor], Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    model, x = Noisy(draw), torch.zeros(ROWS, COLS)
    graph = capture_graph(model, x)
    return graph, graph_inputs(graph, model, x, seed=3)


@pytest.mark.parametrize("name", DRAWS)
def test_mean_is_as_asked_and_backward_has_the_same_numbers(name: str) -> None:
    draw, mean, deviation = DRAWS[name]
    graph, inputs = captured(draw)
    assert len(graph.inputs_of(InputKind.SEED)) == 1
    loss, gradient = run_graph(graph, inputs)
    samples = ROWS if name == "gumbel_softmax" else ROWS * COLS
    assert abs(float(loss) - mean) < 4.5 * deviation / samples**0.5
    assert loss == gradient
    again, _ = run_graph(graph, inputs)
    other, _ = run_graph(graph, {**inputs, "seed": inputs["seed"] + 1})
    assert again == loss and other != loss


def test_variance_is_as_asked() -> None:
    for name in ("randn", "normal.both", "uniform_", "exponential_", "rrelu"):
        draw, mean, deviation = DRAWS[name]
        graph, inputs = captured(lambda x, d=draw, m=mean: (d(x) - m) ** 2)  # type: ignore[misc]
        loss, _ = run_graph(graph, inputs)
        assert float(loss) == pytest.approx(deviation**2, rel=0.06)  # kurtosis 9 / 32768 samples


def test_every_operator_draws_numbers_of_its_own() -> None:
    graph, inputs = captured(lambda x: torch.randn_like(x) * torch.randn_like(x))
    loss, _ = run_graph(graph, inputs)
    assert abs(float(loss)) < 4.5 / (ROWS * COLS) ** 0.5
    ids = [op.args[1] for op in graph.operators if op.op_name.startswith("autopar.")]
    assert ids == [0, 1]


def test_gradient_of_rrelu_is_its_slope() -> None:
    class Slopes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.linspace(-2, 2, 64, dtype=torch.float64))

        def forward(self, scale: Tensor) -> Tensor:
            return functional.rrelu(self.x * scale, training=True).sum()

    model = Slopes()
    graph = capture_graph(model, torch.ones(1, dtype=torch.float64))
    loss, gradient = run_graph(graph, graph_inputs(graph, model, torch.ones(1).double(), seed=1))
    torch.testing.assert_close((gradient * model.x).sum().detach(), loss)  # piecewise linear


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda x: x[torch.randperm(ROWS)], r"randperm.* at .*argsort"),
        (lambda x: torch.multinomial(x + 1, 1), r"multinomial.*Way out.*argmax.*in the batch"),
        (lambda x: torch.poisson(x + 1), r"poisson.*Way out"),
        (lambda x: torch.randint(2**40, (4,)), r"\[0, 1099511627776\).*at most 2\^31"),
        (lambda x: torch.randn(4, dtype=torch.complex64).real, "complex64"),
        (lambda x: torch.rand(4, generator=torch.Generator()), "generator"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(draw: Callable[[Tensor], Any], text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        captured(draw)


def test_permutation_and_sample_as_the_errors_say() -> None:
    graph, inputs = captured(lambda x: torch.rand(ROWS).argsort().diff().abs() > 0)
    assert run_graph(graph, inputs)[0] == 1

    def sample(x: Tensor) -> Tensor:
        probabilities = x[:, :2] + torch.tensor([0.25, 0.75])
        return (probabilities.log() - torch.empty_like(probabilities).exponential_().log()).argmax(
            -1
        )

    graph, inputs = captured(sample)
    assert abs(float(run_graph(graph, inputs)[0]) - 0.75) < 4.5 * (0.1875 / ROWS) ** 0.5
