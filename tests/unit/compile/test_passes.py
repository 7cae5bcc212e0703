"""What is done to a traced program before Inductor sees it: the values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile import alignment
from autopar.compile.alignment import pad_products
from autopar.compile.concatenations import check_sums, keep_sums_apart
from autopar.compile.copies import drop_copies
from autopar.compile.overlap import AHEAD, AHEAD_BYTES, overlap
from autopar.compile.tables import make_operands, make_sums, make_tables
from autopar.errors import InternalError
from autopar.lowering.collectives import STARTS, WAIT, start

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default


def traced(body: Callable[..., list[Tensor]], *inputs: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        module: fx.GraphModule = make_fx(
            body, decomposition_table=select_decomp_table(), tracing_mode="fake"
        )(*inputs)
    return module


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def rotated(x: Tensor, y: Tensor) -> list[Tensor]:
    angles = torch.arange(16)[:, None] * torch.pow(100.0, -torch.arange(4) / 4)
    cos, sin = angles.cos(), angles.sin()
    return [x * cos + y * sin, y * cos - x * sin]


def test_angles_are_tables() -> None:
    x, y = torch.randn(2, 8, 3, 16, 4)
    module = make_tables(traced(rotated, x, y))
    buffers = [n for n in module.graph.nodes if n.target is aten.as_strided.default]
    assert [b.args[0].target for b in buffers][-2:] == [aten.cos.default, aten.sin.default]
    assert all(len(b.users) > 1 for b in buffers[-2:])
    for got, want in zip(module(x, y), rotated(x, y), strict=True):
        torch.testing.assert_close(got, want)


def test_what_is_read_once_is_no_table() -> None:
    x = torch.randn(16, 4)
    module = make_tables(traced(lambda x: [x.cos() * x, x.exp().sum()], x))
    assert aten.as_strided.default not in targets(module)


def blocks(x: Tensor, weight: Tensor) -> list[Tensor]:
    """A stream that each block adds to, whose states are all read at the end, as by backward."""
    found = []
    for _ in range(3):
        x = x + torch.rms_norm(x, [8]) @ weight
        found.append(x)
    return [torch.rms_norm(x, [8]) @ weight for x in found]


def test_a_sum_that_products_part_is_a_buffer() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    module = make_sums(traced(blocks, x, weight))
    sums = [n.args[0] for n in module.graph.nodes if n.target is aten.as_strided.default]
    assert [node.target for node in sums] == [aten.add.Tensor] * 2  # the last is read at the end
    for got, want in zip(module(x, weight), blocks(x, weight), strict=True):
        torch.testing.assert_close(got, want)


def test_a_sum_that_one_kernel_reads_is_no_buffer() -> None:
    """Nor is one of a value and a vector, which costs its readers nothing."""
    bodies: list[Callable[..., list[Tensor]]] = [
        lambda x, w: [torch.rms_norm(x + x @ w, [8]) @ w],
        lambda x, w: [((y := x @ w + w[0]).sin() @ w) * y.cos()],
    ]
    for body in bodies:
        module = make_sums(traced(body, torch.randn(4, 8), torch.randn(8, 8)))
        assert aten.as_strided.default not in targets(module)


def turned(x: Tensor, cos: Tensor, weight: Tensor) -> list[Tensor]:
    """Rows by a value of their position, a head [batch, heads, sequence, width] at a time, then as
    a matrix that two products read."""
    heads = x.view(2, 4, 3, 8).transpose(1, 2) * cos
    rows = heads.transpose(1, 2).reshape(8, 24)
    return [rows @ weight, rows.t() @ x.view(8, 24), heads.sum()]


def test_an_operand_is_a_buffer_that_lies_as_products_read_it() -> None:
    x, cos, weight = torch.randn(2, 4, 24), torch.randn(4, 8), torch.randn(24, 5)
    module = make_operands(traced(turned, x, cos, weight))
    (buffer,) = module.graph.find_nodes(op="call_function", target=aten.as_strided.default)
    assert buffer.args[0].target is aten.mul.Tensor
    assert buffer.meta["val"].stride() == (96, 8, 24, 1)
    for got, want in zip(module(x, cos, weight), turned(x, cos, weight), strict=True):
        torch.testing.assert_close(got, want)


def test_values_in_order_or_of_no_product_are_no_operands() -> None:
    x, weight = torch.randn(2, 4, 24), torch.randn(24, 5)
    bodies: list[Callable[..., list[Tensor]]] = [
        lambda x, w: [(x * 2).view(8, 24) @ w],
        lambda x, w: [(x.transpose(0, 1) * 2).reshape(8, 24).exp() @ w],
        lambda x, w: [(x.transpose(0, 1) * 2).reshape(8, 24) @ w],  # another order in memory
    ]
    for body in bodies:
        module = make_operands(traced(body, x, weight))
        assert aten.as_strided.default not in targets(module)


def casts(x: Tensor, rows: Tensor) -> list[Tensor]:
    table = torch.zeros(8, 4).index_put((rows,), x, accumulate=True)
    return [table.bfloat16().float() * 2]


def test_casts_there_and_back_are_left_out() -> None:
    """Of what a kernel made, and where nobody reads the narrow value."""
    x, rows = torch.randn(6, 4), torch.tensor([1, 7, 1, 3, 0, 1])
    module = drop_copies(traced(casts, x, rows))
    assert convert not in targets(module)
    torch.testing.assert_close(module(x, rows), casts(x, rows), rtol=2**-8, atol=0.0)


def test_other_casts_stay() -> None:
    bodies: list[Callable[..., list[Tensor]]] = [
        lambda x: [(narrow := x.sum(1).bfloat16()), narrow.float()],
        lambda x: [x.sin().bfloat16().float()],
        lambda x: [x.bfloat16().float()],
        lambda x: [x.sum(1).long().float()],
        lambda x: [x.sum(1).double().float()],
    ]
    for body in bodies:
        module = traced(body, torch.randn(3, 4))
        assert targets(drop_copies(module)).count(convert) == 2


@pytest.mark.parametrize("bias_shape", [(13,), (1, 13), (9, 13)])
def test_products_are_padded(monkeypatch: pytest.MonkeyPatch, bias_shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(alignment, "SMALL_PRODUCT", 1)

    def body(a: Tensor, b: Tensor, bias: Tensor) -> list[Tensor]:
        product = torch.addmm(bias, a, b.t())
        back = product.sin()
        return [product, back @ b, back.t() @ a]

    a, b, bias = torch.randn(9, 7), torch.randn(13, 7), torch.randn(bias_shape)
    module = pad_products(traced(body, a, b, bias))
    module.recompile()
    pads = [n for n in module.graph.nodes if n.target is aten.constant_pad_nd.default]
    assert len({(n.args[0], tuple(n.args[1])) for n in pads}) == len(pads)
    for node in module.graph.nodes:
        if node.target in (aten.mm.default, aten.addmm.default):
            sizes = [n.meta["val"].shape for n in node.args[-2:]]
            assert all(size % 4 == 0 for shape in sizes for size in shape), node
    for got, want in zip(module(a, b, bias), body(a, b, bias), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)


def test_a_padding_that_the_model_makes_later_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "SMALL_PRODUCT", 1)

    def body(a: Tensor, b: Tensor) -> list[Tensor]:
        product = a @ b
        wide = aten.constant_pad_nd(a, [0, 25, 0, 0], 0.0)
        return [product, wide, a @ b]

    a, b = torch.randn(8, 7), torch.randn(7, 8)
    module = pad_products(traced(body, a, b))
    module.graph.lint()
    module.recompile()
    assert targets(module).count(aten.constant_pad_nd.default) == 3  # of b once, of a before
    for got, want in zip(module(a, b), body(a, b), strict=True):
        torch.testing.assert_close(got, want)


def test_aligned_and_small_products_stay() -> None:
    a, b = torch.randn(512, 512), torch.randn(512, 513)
    odd = pad_products(traced(lambda a, b: [a @ b], a, b))
    assert aten.constant_pad_nd.default in targets(odd)
    for body in (lambda a, b: [a @ b[:, :512]], lambda a, b: [a[:7] @ b]):
        assert aten.constant_pad_nd.default not in targets(pad_products(traced(body, a, b)))


def test_sums_that_are_joined_are_buffers() -> None:
    """A sum that a concatenation reads as it is, or through a view; other operands stay."""

    def body(x: Tensor, y: Tensor) -> list[Tensor]:
        rows, columns = x.sum(1), x.sum(0, keepdim=True)
        joined = torch.cat([columns, y, columns.exp(), rows.unsqueeze(0)], 1)
        return [joined, rows + 1]

    x, y = torch.randn(6, 5), torch.randn(1, 3)
    module = traced(body, x, y)
    with pytest.raises(InternalError, match="reads the sum"):
        check_sums(module)
    module = keep_sums_apart(module)
    module.recompile()
    buffers = module.graph.find_nodes(op="call_function", target=aten.as_strided.default)
    assert {tuple(b.meta["val"].shape) for b in buffers} == {(1, 5), (6,)}
    for got, want in zip(module(x, y), body(x, y), strict=True):
        torch.testing.assert_close(got, want)


def test_booleans_do_not_travel() -> None:
    module = traced(lambda x: [WAIT(start("all_gather", x > 0, "group", 2, "sum"))], torch.ones(4))
    with pytest.raises(InternalError, match="booleans"):
        overlap(module, [])


LAYERS = 12


def sharded_layers(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Each weight is gathered where it is used; the last value is the sum over the group."""
    for shard in weights:
        gathered = WAIT(start("all_gather", shard, "group", 2, "sum"))
        x = x @ gathered
    return [WAIT(start("all_reduce", x, "group", 2, "sum"))]


def test_gathers_go_a_few_ahead() -> None:
    weights = [torch.randn(256, 512) for _ in range(LAYERS)]
    module = traced(sharded_layers, torch.randn(4, 512), *weights)
    order = targets(overlap(module, range(1, LAYERS + 1)))
    starts = products = waits = 0
    for target in order:
        starts += target in STARTS
        waits += target is WAIT
        products += target is aten.mm.default
        if target in STARTS and starts <= LAYERS:
            assert starts - products <= _most_ahead(weights[0]) + 1
        if target is aten.mm.default and products < LAYERS:
            assert starts >= min(products + AHEAD, LAYERS)
            assert waits <= products
    assert starts == waits == LAYERS + 1


def _most_ahead(shard: Tensor) -> int:
    return max(AHEAD, -(-AHEAD_BYTES // (2 * shard.numel() * shard.itemsize)))
