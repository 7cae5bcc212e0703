"""Which tensors a fused step of AdamW takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.ops import adamw


class Watched(Tensor):
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Lists(SimpleNamespace):
    """Arguments of `fits`: three parameters."""

    def __init__(self) -> None:
        shapes = [(8, 4, 3, 2), (6, 4), (5,)]
        self.parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.gradients, self.averages, self.squares = (
            [torch.zeros_like(p, requires_grad=False) for p in self.parameters] for _ in range(3)
        )
        self.steps = [torch.ones(()) for _ in shapes]

    def fit(self) -> bool:
        return adamw.fits(self.parameters, self.gradients, self.averages, self.squares, self.steps)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Lists:
    """On a CPU that passes for a GPU."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(adamw, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Lists()


def beside(x: Tensor, by: int) -> Tensor:
    """x, `by` elements behind a multiple of 16 bytes."""
    moved = x.new_empty(x.numel() + by)[by:].view(x.shape)
    return moved.copy_(x.detach())


def channels_last(x: Tensor) -> Tensor:
    return x.detach().to(memory_format=torch.channels_last)


def test_tensors_on_a_cpu_are_refused() -> None:
    assert not Lists().fit()


def test_without_triton_all_are_refused(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "has_triton", lambda: False)
    assert not lists.fit()


def test_a_captured_step_is_refused(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lists.fit()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not lists.fit()


def change(name: str, of: int, by: Callable[[Tensor], Any]) -> Callable[[Lists], None]:
    def apply(lists: Lists) -> None:
        tensors = getattr(lists, name)
        tensors[of] = by(tensors[of])

    return apply


def alike(by: Callable[[Tensor], Tensor], of: int) -> Callable[[Lists], None]:
    def apply(lists: Lists) -> None:
        for name in ("parameters", "gradients", "averages", "squares"):
            getattr(lists, name)[of] = by(getattr(lists, name)[of].detach())

    return apply


def with_other_gradients(lists: Lists) -> None:
    lists.gradients = [x + 1 for x in lists.gradients]


def of_one_step(lists: Lists) -> None:
    lists.steps = lists.steps[:1] * 3


def with_strides_of_dims_of_one(lists: Lists) -> None:
    alike(lambda x: x[:1].clone(), 1)(lists)
    change("gradients", 1, lambda x: x.as_strided(x.shape, (1, 1)))(lists)


def without_memory(lists: Lists) -> None:
    lists.gradients[1].untyped_storage().resize_(0)


TAKEN = {
    "as they are": lambda _: None,
    "other gradients": with_other_gradients,
    "channels last": alike(channels_last, 0),
    "transposed": alike(lambda x: x.T.contiguous().T, 1),
    "strides of dims of one": with_strides_of_dims_of_one,
    "no elements": alike(lambda x: beside(x[:0], 1), 1),
    "steps of one dim": change("steps", 0, lambda x: x.reshape(1)),
    "one step": of_one_step,
    "a narrow gradient": change("gradients", 1, lambda x: x.bfloat16()),
    "a narrow gradient, channels last": change(
        "gradients", 0, lambda x: channels_last(x.bfloat16())
    ),
    "a narrow gradient, transposed": change(
        "gradients", 1, lambda x: x.bfloat16().T.contiguous().T
    ),
    "parameters that are none": change("parameters", 0, lambda x: x.detach()),
}
REFUSED = {
    "no tensors": lambda lists: lists.__dict__.update({name: [] for name in vars(lists)}),
    "lists of other lengths": lambda lists: lists.steps.pop(),
    "a wider type": change("parameters", 1, lambda x: x.double()),
    "a gradient in half precision": change("gradients", 1, lambda x: x.half()),
    "a narrow gradient with gaps": change(
        "gradients", 1, lambda x: x.bfloat16().repeat(1, 2)[:, :4]
    ),
    "a narrow gradient in no turn": change(
        "gradients", 0, lambda x: x.bfloat16().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    ),
    "a narrow average": change("averages", 1, lambda x: x.bfloat16()),
    "a step that is an integer": change("steps", 1, lambda x: x.long()),
    "steps of two elements": change("steps", 1, lambda x: x.expand(2)),
    "another shape": change("averages", 1, lambda x: x.T.contiguous()),
    "another order": change("gradients", 0, channels_last),
    "gaps": alike(lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], 1),
    "overlaps": alike(lambda x: x[:1].expand_as(x), 1),
    "sparse": change("gradients", 1, lambda x: x.to_sparse()),
    "misaligned": change("squares", 1, lambda x: beside(x, 1)),
    "no memory": without_memory,
    "on another device": change("gradients", 1, lambda x: x.to("meta")),
    "one that sees operators": change("gradients", 1, lambda x: x.as_subclass(Watched)),
}


@pytest.mark.parametrize("how", TAKEN)
def test_it_takes(lists: Lists, how: str) -> None:
    assert lists.fit()
    TAKEN[how](lists)
    assert lists.fit() and lists.fit()


@pytest.mark.parametrize("how", REFUSED)
def test_it_refuses(lists: Lists, how: str) -> None:
    """Also after tensors that it takes."""
    assert lists.fit()
    REFUSED[how](lists)
    assert not lists.fit() and not lists.fit()


def test_what_stays_is_known(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lists.fit()
    monkeypatch.setattr(adamw, "_belong", lambda *_: pytest.fail("looked at again"))
    with_other_gradients(lists)
    assert lists.fit()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 4), (1, 3, 2, 2), (7,), (1, 1), (3, 4)])
def test_turns(shape: tuple[int, ...]) -> None:
    """Of all orders of a tensor in memory, those that are turns; by counting elements."""
    whole = torch.arange(math.prod(shape))
    found = 0
    for order in itertools.permutations(range(len(shape))):
        back = [order.index(d) for d in range(len(shape))]
        for inverse in itertools.permutations(range(len(shape))):
            parameter = torch.empty([shape[d] for d in inverse]).permute(
                [inverse.index(d) for d in range(len(shape))]
            )
            gradient = torch.empty([shape[d] for d in order]).permute(back)
            turn = adamw._turn(shape, parameter.stride(), gradient.stride())
            if turn is None:
                continue
            found += 1
            outer, inner = turn
            in_memory = whole.view(-1, outer, inner).mT.reshape(-1)
            numbers = torch.empty_strided(shape, parameter.stride(), dtype=torch.int64)
            numbers.as_strided(whole.shape, (1,)).copy_(whole)
            turned = torch.empty_strided(shape, gradient.stride(), dtype=torch.int64)
            assert torch.equal(turned.copy_(numbers).as_strided(whole.shape, (1,)), in_memory)
    dims = sum(length > 1 for length in shape)
    # Each cut of what follows the dims that stay outermost, and the same order once.
    ways = 1 + sum(rest - 1 for rest in range(2, dims + 1))
    copies = math.factorial(len(shape)) ** 2 // math.factorial(dims) ** 2
    assert found == math.factorial(dims) * ways * copies
