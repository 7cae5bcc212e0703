"""The kernel of AdamW against torch's and against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autopar.ops.adamw import adamw, fits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(0,), (1,), (7,), (1024,), (4097,), (1_000_003,), (12, 3, 5, 7), (64, 32, 3, 3), (70, 93)]
DECAY, EPS = 0.1, 1e-8
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)]


def randn(seed: int) -> list[Tensor]:
    """Four dims: channels last; two: transposed."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    made = []
    for shape in SHAPES:
        x = torch.randn(shape, device="cuda", generator=generator)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        made.append(x.T if x.dim() == 2 else x)
    return made


class State:
    """Parameters of `SHAPES` and what AdamW keeps for them."""

    def __init__(self, made: int = 0) -> None:
        self.parameters = randn(0)
        self.averages, self.squares = (
            [torch.zeros_like(x) for x in self.parameters] for _ in range(2)
        )
        self.steps = [torch.full((), float(made), device="cuda") for _ in SHAPES]

    def step(self, gradients: list[Tensor], **how: float) -> None:
        lists = (self.parameters, gradients, self.averages, self.squares, self.steps)
        torch._foreach_add_(self.steps, 1)
        assert fits(*lists)
        adamw(*lists, weight_decay=DECAY, eps=EPS, **how)

    def torch_step(self, gradients: list[Tensor], lr: float, beta1: float, beta2: float) -> None:
        torch._foreach_add_(self.steps, 1)
        torch._fused_adamw_(
            self.parameters,
            gradients,
            self.averages,
            self.squares,
            [],
            self.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=DECAY,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )


def wide_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: float, lr: float, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter, average and square after step t, float64."""
    p, g, m, v = (x.double() for x in (p, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    change = m / (1 - beta1**t) / (v.sqrt() / math.sqrt(1 - beta2**t) + EPS)
    return p - lr * DECAY * p - lr * change, m, v


def gradients_of(step: int) -> list[Tensor]:
    return [x * 10.0 ** (step - 2) for x in randn(100 + step)]


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_steps_are_those_of_torch(beta1: float, beta2: float) -> None:
    ours, theirs = State(), State()
    for step in range(4):
        lr = 1e-2 * (step + 1) / 3
        gradients = gradients_of(step)
        ours.step(gradients, lr=lr, beta1=beta1, beta2=beta2)
        theirs.torch_step(gradients, lr, beta1, beta2)
        for name in ("averages", "squares"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-7 * 100.0**step
            )
        torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("made", [0, 1, 999, 50_000])
@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_a_step_is_exact_to_rounding(beta1: float, beta2: float, made: int) -> None:
    state, lr = State(made), 1e-3
    state.step(gradients_of(1), lr=lr, beta1=beta1, beta2=beta2)
    before = [[x.clone() for x in of] for of in (state.parameters, state.averages, state.squares)]
    gradients = gradients_of(2)
    state.step(gradients, lr=lr, beta1=beta1, beta2=beta2)
    after = (state.parameters, state.averages, state.squares)
    for (p, m, v), g, found in zip(
        zip(*before, strict=True), gradients, zip(*after, strict=True), strict=True
    ):
        want = wide_step(p, g, m, v, made + 2, lr, beta1, beta2)
        # Half a unit in the last place of numbers of [4, 8), and the parts of what has cancelled.
        for x, exact, atol in zip(found, want, (2.4e-7, 4.8e-7, 1e-12), strict=True):
            torch.testing.assert_close(x.double(), exact, rtol=3e-7, atol=atol)


@pytest.mark.parametrize(("chunk", "block", "stages"), [(2048, 2048, 1), (16384, 512, 3)])
def test_however_it_is_cut(
    chunk: int, block: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for is_cut in (False, True):
        if is_cut:
            monkeypatch.setattr("autopar.ops.adamw_kernel.CHUNK", chunk)
            monkeypatch.setattr("autopar.ops.adamw_kernel.BLOCK", block)
            monkeypatch.setattr("autopar.ops.adamw_kernel.STAGES", stages)
        state = State()
        for step in range(2):
            state.step(gradients_of(step), lr=1e-3, beta1=0.9, beta2=0.999)
        found.append([*state.parameters, *state.averages, *state.squares])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_narrow_gradients_are_read_where_they_lie() -> None:
    """In bfloat16, channels last beside row-major parameters, and in the parameters' own order."""
    shapes = [(4097,), (64, 32, 3, 3), (8, 200, 7, 7), (96, 128, 1, 1), (130, 70), (1, 5, 3, 3)]
    found = []
    for narrow in (True, False):
        torch.manual_seed(0)
        values = [torch.randn(shape, device="cuda") for shape in shapes for _ in range(3)]
        made = [x.bfloat16() for x in values[::3]]
        if narrow:
            made = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in made]
        else:
            made = [x.float() for x in made]
        parameters, averages = values[1::3], values[2::3]
        squares = [x * x for x in averages]
        steps = [torch.full((), 3.0, device="cuda") for _ in shapes]
        lists = (parameters, made, averages, squares, steps)
        assert fits(*lists)
        adamw(*lists, lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=DECAY, eps=EPS)
        found.append([*parameters, *averages, *squares])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_gradients_are_added_as_they_are_read() -> None:
    """In bfloat16, as two ranks made them."""
    shapes = [(4096,), (64, 24, 3, 3), (130, 72), (0, 8), (16, 8)]
    found = []
    for added in (True, False):
        torch.manual_seed(0)
        values = [torch.randn(shape, device="cuda") for shape in shapes for _ in range(4)]
        ones, others = ([x.bfloat16() for x in values[first::4]] for first in (0, 1))
        parameters, averages = values[2::4], values[3::4]
        squares = [x * x for x in averages]
        steps = [torch.full((), 3.0, device="cuda") for _ in shapes]
        addends = [*others[:-1], None]  # one gradient has no addend
        made = [*ones[:-1], others[-1].float()]
        if not added:
            made[:-1] = [x.float() + y.float() for x, y in zip(ones, others[:-1], strict=False)]
        lists = (parameters, made, averages, squares, steps, addends if added else [])
        assert fits(*lists)
        adamw(*lists, lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=DECAY, eps=EPS)
        found.append([*parameters, *averages, *squares])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_infinite_squares_stop_a_parameter() -> None:
    for beta2 in (0.999, 0.5):
        state = State()
        for x in state.squares:
            x.fill_(float("inf"))
        before = [x.clone() for x in state.parameters]
        state.step(gradients_of(2), lr=1e-3, beta1=0.9, beta2=beta2)
        torch.testing.assert_close(state.parameters, [x * (1 - 1e-3 * DECAY) for x in before])


def test_what_is_written_is_of_another_version() -> None:
    state = State()
    gradients = gradients_of(1)
    written = [*state.parameters, *state.averages, *state.squares]
    before = [x._version for x in (*written, *gradients)]
    state.step(gradients, lr=1e-3, beta1=0.9, beta2=0.999)
    after = [x._version for x in (*written, *gradients)]
    assert after == [x + 1 for x in before[: len(written)]] + before[len(written) :]


def test_a_captured_step_is_refused() -> None:
    state = State()
    lists = (state.parameters, gradients_of(1), state.averages, state.squares, state.steps)
    assert fits(*lists)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        state.steps[0].add_(1)
        refused = not fits(*lists)
    assert refused
