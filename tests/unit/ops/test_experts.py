"""autopar::experts against a loop over tokens, transformers' own forms, and on shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from autopar.ops.experts import ACTIVATIONS

EXPERTS = torch.ops.autopar.experts
TOKENS, SLOTS, NUM, WIDTH, HIDDEN = 7, 2, 5, 6, 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
REFERENCES = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda z: functional.relu(z).square(),
}


def operands(dtype: torch.dtype, parts: int = 2) -> tuple[Tensor, ...]:
    """Expert 2 is nobody's choice."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    index = torch.rand(TOKENS, NUM - 1, generator=generator).argsort(1)[:, :SLOTS]
    index = index + (index >= 2)
    x, weight = draw(TOKENS, HIDDEN), draw(TOKENS, SLOTS)
    return x, index, weight, draw(NUM, parts, WIDTH, HIDDEN), draw(NUM, HIDDEN, WIDTH)


def by_token(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, act: Any
) -> Tensor:
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for k, expert in enumerate(index[t].tolist()):
            z = up[expert] @ x[t]
            hidden = act(z[0]) * z[1] if up.shape[1] == 2 else act(z[0])
            total = total + weight[t, k] * (down[expert] @ hidden)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_a_loop_over_tokens(dtype: torch.dtype, activation: str, parts: int) -> None:
    tensors = operands(dtype, parts)
    wide = [
        t.double().detach().requires_grad_(t.is_floating_point()) if t.is_floating_point() else t
        for t in tensors
    ]
    out = EXPERTS(*tensors, activation, 0, NUM)
    want = by_token(*wide, REFERENCES[activation])
    assert out.is_contiguous() and out.dtype == dtype
    dout = torch.randn(out.shape, dtype=dtype)
    grads = torch.autograd.grad(out, [tensors[i] for i in (0, 2, 3, 4)], dout)
    wants = torch.autograd.grad(want, [wide[i] for i in (0, 2, 3, 4)], dout.double())
    for got, reference in zip((out, *grads), (want, *wants), strict=True):
        assert got.is_contiguous()
        scale = float(reference.detach().abs().max())
        torch.testing.assert_close(got.double(), reference, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_gradcheck() -> None:
    x, index, weight, up, down = operands(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: EXPERTS(t[0], index, *t[1:], "silu", 0, NUM), (x, weight, up, down)
    )


def test_parts_of_the_experts_add_up() -> None:
    """Elsewhere counts zero, as do numbers that no expert has (a sentinel of transformers)."""
    x, index, weight, up, down = (t.detach() for t in operands(torch.float64))
    index[3] = NUM
    whole = EXPERTS(x, index, weight, up, down, "gelu", 0, NUM)
    assert not whole[3].any()
    parts = [
        EXPERTS(x, index, weight, up[a:b], down[a:b], "gelu", a, NUM) for a, b in ((0, 2), (2, NUM))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-13)
    backward = torch.ops.autopar.experts_backward
    dout = torch.randn_like(x)
    dx, dweight, dup, ddown = backward(dout, x, index, weight, up, down, "gelu", 0, NUM)
    halves = [
        backward(dout, x, index, weight, up[a:b], down[a:b], "gelu", a, NUM)
        for a, b in ((0, 2), (2, NUM))
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], dx, rtol=0, atol=1e-12)
    torch.testing.assert_close(halves[0][1] + halves[1][1], dweight, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([h[2] for h in halves]), dup, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([h[3] for h in halves]), ddown, rtol=0, atol=1e-12)


def test_no_token() -> None:
    _, index, weight, up, down = (t.detach() for t in operands(torch.float64))
    none = torch.zeros(0, HIDDEN, dtype=torch.float64)
    grads = torch.ops.autopar.experts_backward(
        none, none, index[:0], weight[:0], up, down, "silu", 0, NUM
    )
    assert [tuple(g.shape) for g in grads] == [(0, HIDDEN), (0, SLOTS), up.shape, down.shape]
    assert not any(g.any() for g in grads)


def test_flops_are_those_of_each_tokens_experts() -> None:
    tensors = operands(torch.float64)
    row = 3 * WIDTH * HIDDEN  # multiply-adds: gate, up, down
    with FlopCounterMode(display=False) as counter:
        EXPERTS(*tensors, "silu", 0, NUM).sum().backward()
    again = 2 * WIDTH * HIDDEN  # z, in backward
    assert counter.get_total_flops() == 2 * TOKENS * SLOTS * (3 * row + again)


def test_shapes_are_checked() -> None:
    x, index, weight, up, down = operands(torch.float64)
    with pytest.raises(ValueError, match="wants x"):
        EXPERTS(
            x.to("meta"),
            index.to("meta"),
            weight.to("meta"),
            down.to("meta"),
            up.to("meta"),
            "silu",
            0,
            NUM,
        )
