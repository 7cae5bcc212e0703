"""Max-pools by offsets in captured graphs: the values of eager, and which pools stay ATen's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.graph.capture import capture_graph
from autopar.graph.program import Graph
from tests.unit.graph import zoo

torch.set_num_threads(1)
aten, own = torch.ops.aten, torch.ops.autopar

ATEN = {aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default}
OURS = {own.max_pool.default, own.max_pool_backward.default}


class Pooled(nn.Module):
    """A pool between two convolutions."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.first(x))).square().mean()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def captured(pool: Callable[[Tensor], Tensor], *shape: int) -> Graph:
    """A graph whose loss and gradients are eager's."""
    torch.manual_seed(0)
    model, x = Pooled(pool).double(), image(*shape or (2, 2, 9, 10))
    return zoo.assert_equals_eager(model, x, None, 1e-12)


def targets(graph: Graph) -> set[object]:
    return {op.target for op in graph.operators}


def unpooled(x: Tensor) -> Tensor:
    y, indices = functional.max_pool2d(x, 2, return_indices=True)
    return functional.max_unpool2d(y, indices, 2, output_size=x.shape[-2:])


def twice(x: Tensor) -> Tensor:
    return functional.max_pool2d(functional.max_pool2d(x, 2), 2)


def with_one_number_for_both(x: Tensor) -> Tensor:
    y: Tensor = aten.max_pool2d_with_indices(x, [3], [], [1])[0]
    return y


def of_a_signal(x: Tensor) -> Tensor:
    return functional.max_pool1d(x.flatten(2), 3, stride=2).unsqueeze(2)


@pytest.mark.parametrize(
    "pool",
    [
        partial(functional.max_pool2d, kernel_size=3, stride=2, padding=1),
        partial(functional.max_pool2d, kernel_size=2),
        partial(functional.max_pool2d, kernel_size=(2, 3), stride=2, dilation=(2, 1)),
        partial(functional.max_pool2d, kernel_size=3, stride=2, ceil_mode=True),
        partial(functional.max_pool2d, kernel_size=5, stride=1, padding=2),
        with_one_number_for_both,
        twice,
        of_a_signal,
    ],
)
def test_pools_keep_offsets(pool: Callable[[Tensor], Tensor]) -> None:
    found = targets(captured(pool))
    assert found >= OURS and not found & ATEN


def test_an_image_without_a_batch() -> None:
    assert targets(captured(partial(functional.max_pool2d, kernel_size=2), 2, 8, 8)) >= OURS


def test_backward_reads_a_byte_for_each_maximum() -> None:
    graph = captured(partial(functional.max_pool2d, kernel_size=3, stride=2, padding=1))
    (pool,) = (op for op in graph.operators if op.target is own.max_pool.default)
    (back,) = (op for op in graph.operators if op.target is own.max_pool_backward.default)
    y, offsets = pool.results
    assert y is not None and offsets is not None
    assert offsets.nbytes == y.nbytes // 8 and back.forward == pool.name
    assert back.operands[1:] == (pool.refs[1],)


@pytest.mark.parametrize(
    "pool",
    [
        partial(functional.max_pool2d, kernel_size=6, stride=2),
        partial(functional.max_pool2d, kernel_size=2, stride=6),
        unpooled,
    ],
)
def test_large_windows_and_pools_whose_indices_are_read_stay(
    pool: Callable[[Tensor], Tensor],
) -> None:
    found = targets(captured(pool))
    assert found >= ATEN and not found & OURS


class Integers(nn.Module):
    """A pool of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = torch.ops.aten.max_pool2d_with_indices(x, [2, 2])
        return (y * self.scale).sum()


def test_pools_of_integers_stay() -> None:
    graph = capture_graph(Integers(), torch.arange(32).reshape(2, 4, 4))
    assert aten.max_pool2d_with_indices.default in targets(graph)
    assert not targets(graph) & OURS
