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


def of_a_relu(x: Tensor) -> Tensor:
    return functional.max_pool2d(functional.relu(x), 3, stride=2, padding=1)


def test_a_relu_before_a_pool_is_masked_by_the_pools_result() -> None:
    graph = captured(of_a_relu)
    (relu,) = (op for op in graph.operators if op.target is aten.relu.default)
    (mask,) = (op for op in graph.operators if op.target is aten.threshold_backward.default)
    (pool,) = (op for op in graph.operators if op.target is own.max_pool.default)
    (back,) = (op for op in graph.operators if op.target is own.max_pool_backward.default)
    assert [op for op in graph.operators if relu.refs[0] in op.operands] == [pool]
    assert mask.operands[1] == pool.refs[0] and back.operands[0] == mask.refs[0]
    assert mask.forward == back.forward == pool.name


class Weighted(nn.Module):
    """A sum of a relu's pool, each maximum times a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.randint(-2, 3, (2, 3, 9, 10)).float()
        self.x = nn.Parameter(torch.where(torch.rand(x.shape) < 0.02, torch.nan, x))

    def forward(self, weight: Tensor) -> Tensor:
        return (of_a_relu(self.x).nan_to_num() * weight).sum()


def test_masks_by_the_result_are_those_by_the_operand_bit_for_bit() -> None:
    """Of ties, of windows without a positive value, and of values that are no number."""
    torch.manual_seed(0)
    zoo.assert_equals_eager(Weighted(), torch.randn(2, 3, 5, 5), None, 0.0)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: of_a_relu(x) + x.relu().mean(),
        lambda x: of_a_relu(x.relu()) + functional.max_pool2d(x.relu(), 3, 2, 1),
        lambda x: functional.max_pool2d(x.relu(), 2) + functional.max_pool2d(x.relu(), 2),
        lambda x: functional.max_pool2d(functional.max_pool2d(x.relu(), 2).relu(), 2),
        lambda x: twice(x.relu()),
        lambda x: (lambda y: functional.max_pool2d(y, 2) + y.sum())(x.relu()),
    ],
)
def test_relus_and_pools_in_other_orders(pool: Callable[[Tensor], Tensor]) -> None:
    captured(pool)


def test_a_relu_that_others_read_is_masked_by_itself() -> None:
    def pool(x: Tensor) -> Tensor:
        y = x.relu()
        return functional.max_pool2d(y, 2) + y.sum()

    graph = captured(pool)
    (relu,) = (op for op in graph.operators if op.target is aten.relu.default)
    (mask,) = (op for op in graph.operators if op.target is aten.threshold_backward.default)
    assert mask.operands[1] == relu.refs[0]


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
