"""What a user can get wrong, end to end: one error each, that says what was got and the way out.

Errors of capture in detail: tests/unit/graph/test_capture.py; of random operators:
test_randomness.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.errors import AutoparError, BatchError, CaptureError, OptionError
from autopar.runtime.module import ParallelModel

X = torch.ones(8, 4)


class Probe(nn.Module):
    """A linear layer and what a test does with it."""

    def __init__(self, body: Callable[[nn.Linear, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.linear, x)


class Filled(nn.Module):
    """A parameter and a buffer that nothing initialises."""

    def __init__(self, parameter: str, buffer: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, device=parameter))
        self.register_buffer("scale", torch.ones(4, device=buffer))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight * self.scale).mean()


def mean(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(x).mean()


def parallel(model: Any, batch: Any, loss_fn: Any = None) -> ParallelModel:
    return autopar.parallelize(
        model, batch, loss_fn=loss_fn, cluster="cpu:1x1", device="cpu", memory_budget="1GiB"
    )


@cache
def trained() -> ParallelModel:
    return parallel(Probe(mean), X)


DEPENDS = r"depends on the value of a tensor at .*test_bad_input.*Way out"
NO_LOSS = "no scalar loss but {}.*Pass loss_fn"

MODELS: dict[str, tuple[Any, str]] = {
    "boolean index": (Probe(lambda f, x: f(x)[x > 0].mean()), DEPENDS),
    "unique": (Probe(lambda f, x: f(x).mean() * x.unique().numel()), DEPENDS),
    "slice by value": (Probe(lambda f, x: f(x)[: int(x[0, 0])].mean()), DEPENDS),
    "permutation": (Probe(lambda f, x: f(x[torch.randperm(8)]).mean()), "randperm.*Way out"),
    "sample": (Probe(lambda f, x: (f(x) * torch.multinomial(x, 4)).mean()), "multinomial.*Way out"),
    "nothing": (Probe(lambda f, x: None), NO_LOSS.format("a NoneType")),
    "logits only": (Probe(lambda f, x: {"logits": f(x)}), NO_LOSS.format("a dict with.*logits")),
    "integer loss": (Probe(lambda f, x: f(x).argmax()), NO_LOSS.format("torch.int64 of shape")),
    "complex loss": (
        Probe(lambda f, x: torch.complex(f(x), f(x)).mean()),
        NO_LOSS.format("torch.complex64"),
    ),
    "frozen": (Probe(mean).requires_grad_(False), "no parameter that requires a gradient.*Check"),
    "writes a parameter": (
        Probe(lambda f, x: (f.weight.data.mul_(0.5), f(x).mean())[1]),
        "writes into its parameter 'linear.weight' in place",
    ),
    "no module": (mean, "the model is a function: pass an nn.Module"),
    "no weight": (Filled("meta", "cpu"), "'weight' is on meta.*reset_parameters.*initialiser"),
    "no buffer": (Filled("cpu", "meta"), "'scale' is on meta.*initialiser.*on the CPU"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, text = MODELS[name]
    error: type[AutoparError] = OptionError if "meta" in text else CaptureError
    with pytest.raises(error, match=text):
        parallel(model, X)


EXAMPLES: dict[str, tuple[Any, str]] = {
    "no rows": (torch.ones(0, 4), "has no rows.*pass a batch as large"),
    "no arguments": ((), "missing 1 required positional argument.*model.*batch"),
    "sparse": (X.to_sparse(), "layout torch.sparse_coo: only dense.*values and indices"),
    "text": ("hello", "is a str: pass a tensor"),
    "array": ((X.numpy(),), "is a ndarray.*Convert it to a tensor"),
    "width": (torch.ones(8, 5), "failed while it was traced.*Check that the model runs"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_batches(name: str) -> None:
    batch, text = EXAMPLES[name]
    with pytest.raises(CaptureError, match=text):
        parallel(Probe(mean), batch)


BATCHES: dict[str, tuple[Any, str]] = {
    "rows": (torch.ones(6, 4), r"float32\[6, 4\], expected float32\[8, 4\]"),
    "no rows": (torch.ones(0, 4), r"float32\[0, 4\], expected float32\[8, 4\]"),
    "width": (torch.ones(8, 5), r"float32\[8, 5\], expected float32\[8, 4\]"),
    "rank": (torch.ones(8), r"float32\[8\], expected float32\[8, 4\]"),
    "dtype": (X.double(), r"float64\[8, 4\], expected float32\[8, 4\]"),
    "structure": ((X,), "another structure.*Pass batches like the example"),
    "array": (X.numpy(), "must be a tensor: got ndarray"),
    "nothing": (None, "must be a tensor: got NoneType"),
    "no data": (X.to("meta"), "on meta and has no data"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_a_step(name: str) -> None:
    batch, text = BATCHES[name]
    for step in (trained().train_step, trained().eval_step):
        with pytest.raises(BatchError, match=text):
            step(batch)


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda outputs, batch: None, "loss_fn returned a NoneType"),
        (lambda outputs, batch: outputs, r"loss_fn returned torch.float32 of shape \(8, 4\)"),
        (lambda outputs, batch: 1.0, "loss_fn returned a float"),
    ],
)
def test_loss_functions(loss_fn: Callable[..., Any], text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        parallel(nn.Linear(4, 4), X, loss_fn)
