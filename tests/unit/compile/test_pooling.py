"""Max-pools and their gradients as a compiler gets them are torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.inductor import compile_module
from autopar.compile.kernels import decompositions
from tests.devices import DEVICES
from tests.unit.compile.inductor_memory import moved_bytes
from tests.unit.ops.pools import POOLS, Pool, both_ways, by_offsets, inputs

aten, own = torch.ops.aten, torch.ops.autopar


def of(pool: Pool) -> Callable[..., list[Tensor]]:
    return lambda x, grad: by_offsets(x, grad, *pool)


def traced(play: Callable[..., object], *given: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        module: fx.GraphModule = make_fx(
            play, decomposition_table=decompositions([]), tracing_mode="fake"
        )(*given)
    module.graph.eliminate_dead_code()
    return module


def targets(module: fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float64, torch.contiguous_format), (torch.float32, torch.channels_last)],
)
def test_values_are_torchs(dtype: torch.dtype, layout: torch.memory_format) -> None:
    given = [
        each.contiguous(memory_format=layout)
        for pool, size in POOLS
        for each in inputs(pool, (2, 3, *size), dtype)
    ]

    def play(by: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Tensor]:
        pairs = zip(tensors[::2], tensors[1::2], POOLS, strict=True)
        return [made for x, grad, (pool, _) in pairs for made in by(x, grad, *pool)]

    module = traced(partial(play, by_offsets), *given)
    assert targets(module).count(own.max_pool_backward.default) == len(POOLS)
    for got in (module(*given), compile_module(module).call(list(given))):
        for one, other in zip(got, play(both_ways, *given), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            assert one.stride() == other.stride()


def test_values_that_are_no_number() -> None:
    """Which of a window's gets the gradient is the forward's choice."""
    pool = POOLS[0][0]
    x, grad = inputs(pool, (2, 3, 12, 16), torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.05, torch.nan, x)

    def play(x: Tensor, grad: Tensor) -> list[Tensor]:
        _, offsets = own.max_pool(x, *pool)
        return [offsets, own.max_pool_backward(grad, offsets, [12, 16], *pool[:-1])]

    offsets, dx = compile_module(traced(play, x, grad)).call([x, grad])
    want = own.max_pool_backward(grad, offsets, [12, 16], *pool[:-1])
    torch.testing.assert_close(dx, want, rtol=0, atol=0)


def test_an_image_without_a_batch() -> None:
    pool = POOLS[0][0]
    given = inputs(pool, (3, 12, 16), torch.float32)
    got = compile_module(traced(of(pool), *given)).call(list(given))
    torch.testing.assert_close(list(got), both_ways(*given, *pool))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_narrow_type_are_summed_in_a_wide_one(device: str) -> None:
    pool = POOLS[0][0]
    x, grad = (t.to(device) for t in inputs(pool, (2, 8, 12, 16), torch.bfloat16))
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    module = traced(of(pool), x, grad)
    exact = both_ways(x.double(), grad.double(), *pool)[1]
    for got in (module(x, grad), compile_module(module).call([x, grad])):
        assert got[1].dtype == torch.bfloat16
        torch.testing.assert_close(got[1].double(), exact, rtol=2**-8, atol=0)


def test_a_gradient_of_offsets_of_another_program() -> None:
    pool = POOLS[0][0]
    x, grad = inputs(pool, (2, 3, 12, 16), torch.float32)
    offsets = own.max_pool(x, *pool)[1]

    def backward(grad: Tensor, offsets: Tensor) -> tuple[Tensor]:
        return (own.max_pool_backward(grad, offsets, [12, 16], *pool[:-1]),)

    alone = traced(backward, grad, offsets)
    assert own.max_pool_backward.default in targets(alone)
    want = both_ways(x, grad, *pool)[1]
    torch.testing.assert_close(compile_module(alone).call([grad, offsets])[0], want)


def test_offsets_and_gradients_are_read_once() -> None:
    """By one kernel, which writes the result."""
    pool = POOLS[0][0]
    x, grad = inputs(pool, (2, 32, 12, 16), torch.bfloat16)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    module = traced(of(pool), x, grad)
    y_bytes, offset_bytes = grad.nbytes, grad.numel()
    forward = x.nbytes + y_bytes + offset_bytes
    assert moved_bytes(module) == forward + offset_bytes + grad.nbytes + x.nbytes
