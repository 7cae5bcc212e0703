"""Gradients of max-pools as a compiler gets them are torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile.inductor import compile_module
from autopar.compile.kernels import decompositions
from tests.devices import DEVICES
from tests.unit.compile.inductor_memory import moved_bytes

aten, own = torch.ops.aten, torch.ops.autopar

Pool = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], bool]

# kernel, stride, padding, dilation, ceil_mode; rows and columns
POOLS: list[tuple[Pool, tuple[int, int]]] = [
    (([3, 3], [2, 2], [1, 1], [1, 1], False), (12, 16)),
    (([3, 3], [2, 2], [1, 1], [1, 1], False), (11, 13)),
    (([3, 3], [2, 2], [0, 0], [1, 1], True), (10, 9)),
    (([2, 2], [], [0, 0], [1, 1], False), (8, 9)),
    (([3], [1], [1], [1], False), (5, 6)),
    (([2, 3], [3, 1], [1, 0], [1, 2], False), (9, 10)),  # rows in no window
    (([5, 4], [2, 3], [2, 2], [2, 1], True), (14, 15)),
    (([5, 5], [1, 1], [2, 2], [1, 1], False), (3, 4)),
    (([1, 1], [2, 2], [0, 0], [1, 1], False), (5, 7)),
]


def both_ways(x: Tensor, grad: Tensor, *pool: object) -> list[Tensor]:
    y, indices = aten.max_pool2d_with_indices(x, *pool)
    return [y, aten.max_pool2d_with_indices_backward(grad, x, *pool, indices)]


def of(pool: Pool) -> Callable[..., list[Tensor]]:
    return lambda x, grad: both_ways(x, grad, *pool)


def inputs(pool: Pool, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, tuple(shape), generator=generator).to(dtype)
    y, _ = aten.max_pool2d_with_indices(x, *pool)
    return x, torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)


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

    def play(*tensors: Tensor) -> list[Tensor]:
        pairs = zip(tensors[::2], tensors[1::2], POOLS, strict=True)
        return [made for x, grad, (pool, _) in pairs for made in both_ways(x, grad, *pool)]

    module = traced(play, *given)
    assert targets(module).count(own.max_pool_backward.default) == len(POOLS)
    for got in (module(*given), compile_module(module).call(list(given))):
        for one, other in zip(got, play(*given), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            assert one.stride() == other.stride()


def test_values_that_are_no_number() -> None:
    """Which of a window's gets the gradient is the forward's choice."""
    pool = POOLS[0][0]
    x, grad = inputs(pool, (2, 3, 12, 16), torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.05, torch.nan, x)

    def play(x: Tensor, grad: Tensor) -> list[Tensor]:
        _, indices = aten.max_pool2d_with_indices(x, *pool)
        return [indices, aten.max_pool2d_with_indices_backward(grad, x, *pool, indices)]

    indices, dx = compile_module(traced(play, x, grad)).call([x, grad])
    want = aten.max_pool2d_with_indices_backward(grad, x, *pool, indices)
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


def test_other_calls_are_left() -> None:
    """Large windows or strides, and a gradient whose forward is of another program."""
    for kernel, stride in (([6, 5], [2, 2]), ([2, 2], [6, 5])):
        large: Pool = (kernel, stride, [0, 0], [1, 1], False)
        given = inputs(large, (2, 3, 12, 16), torch.float32)
        module = traced(of(large), *given)
        assert own.max_pool_backward.default not in targets(module)
        for got, want in zip(module(*given), both_ways(*given, *large), strict=True):
            torch.testing.assert_close(got, want)

    pool = POOLS[0][0]
    x, grad = inputs(pool, (2, 3, 12, 16), torch.float32)
    indices = aten.max_pool2d_with_indices(x, *pool)[1]

    def backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        gradient: Tensor = aten.max_pool2d_with_indices_backward(grad, x, *pool, indices)
        return gradient

    alone = traced(backward, grad, x, indices)
    assert own.max_pool_backward.default not in targets(alone)
    torch.testing.assert_close(alone(grad, x, indices), backward(grad, x, indices))


def test_offsets_and_gradients_are_read_once() -> None:
    """By one kernel, which writes the result."""
    pool = POOLS[0][0]
    x, grad = inputs(pool, (2, 32, 12, 16), torch.bfloat16)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    module = traced(of(pool), x, grad)
    y_bytes, offset_bytes = grad.nbytes, grad.numel()
    forward = x.nbytes + y_bytes + offset_bytes
    assert moved_bytes(module) == forward + offset_bytes + grad.nbytes + x.nbytes
