"""Collectives as copies between ranks: where they are received, and what the verifier refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx

from autopar.compile import overlap as order
from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import CAST
from autopar.compile.overlap import SMALL_BYTES, overlap
from autopar.compile.peers import (
    Exchange,
    Peers,
    Place,
    _assign,
    _Copy,
    check_places,
    copy_between_peers,
)
from autopar.errors import InternalError
from autopar.lowering.collectives import STARTS, WAIT, start
from autopar.lowering.program import CollectiveOp
from autopar.ops.peers import PEER_COPY, PEER_WAIT, part_of_place
from tests.unit.compile.test_passes import targets, traced

aten = torch.ops.aten

WIDTH, LAYERS, GROUP = 1024, 6, "axis0"  # wide enough that no reduction is packed
Body = Callable[..., list[Tensor]]


def collective(op: str, value: Tensor, size: int, reduce: str = "sum") -> Tensor:
    found: Tensor = WAIT(start(op, value, GROUP, size, reduce))
    return found


def layers(size: int) -> Body:
    """Weights are gathered for forward and again for backward, as if they were freed between; their
    gradients are reduced in bfloat16 and read in float32."""

    def body(x: Tensor, *shards: Tensor) -> list[Tensor]:
        states = [x]
        for shard in shards:
            weight = collective("all_gather", shard.bfloat16(), size)
            states.append((states[-1] @ weight.t()).relu())
        grad, grads = states[-1] * 2, []
        for shard, state in zip(shards[::-1], states[-2::-1], strict=True):
            grads.append(collective("reduce_scatter", grad.t() @ state, size).float())
            grad = grad @ collective("all_gather", shard.bfloat16() * 1, size)
        return [*grads, grad.float()]

    return body


def prepared(body: Body, size: int, *inputs: Tensor) -> tuple[fx.GraphModule, tuple[Place, ...]]:
    parameters = range(1, len(inputs))
    module = overlap(traced(body, *inputs), parameters)
    module, exchange = copy_between_peers(module, {GROUP: Peers(0, size)}, parameters)
    assert not exchange.addends
    return module, exchange.places


def inputs(size: int, num_layers: int = LAYERS) -> list[Tensor]:
    shards = [torch.randn(WIDTH // size, WIDTH) for _ in range(num_layers)]
    return [torch.randn(4, WIDTH).bfloat16(), *shards]


@pytest.mark.parametrize("size", [2, 4])
def test_places_are_used_again(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(order, "AHEAD_BYTES", 0)
    module, places = prepared(layers(size), size, *inputs(size))
    found = targets(module)
    assert not STARTS.keys() & set(found) and WAIT not in found
    copies = module.graph.find_nodes(op="call_function", target=PEER_COPY)
    assert len(copies) == 3 * LAYERS == found.count(PEER_WAIT)
    assert all(place.dtype is torch.bfloat16 and place.group == GROUP for place in places)
    assert 2 <= len(places) < len(copies) / 2
    assert max(place.numel for place in places) == WIDTH * WIDTH
    results = module.graph.output_node().args[0]
    assert all(node.meta["val"].dtype is torch.float32 for node in results)
    for result in results[:-1]:  # what a sum is read as is made of it without another rounding
        (value,) = result.all_input_nodes
        while value.target is not aten.add.Tensor:
            assert value.meta["val"].dtype is torch.float32
            (value,) = value.all_input_nodes


def test_a_parameter_is_cast_where_its_part_lies() -> None:
    def body(x: Tensor, *shards: Tensor) -> list[Tensor]:
        one, two, three, four = shards
        twice = four.bfloat16()
        weights = [
            collective("all_gather", one.bfloat16(), 2),
            collective("all_gather", two.bfloat16().view(-1), 2),
            collective("all_gather", three.bfloat16().t().contiguous(), 2),
            collective("all_gather", twice, 2),
        ]
        return [x @ weight.view(WIDTH, -1) for weight in weights] + [x[:, : len(twice)] @ twice]

    module, _ = prepared(body, 2, *inputs(2, 4))
    sent = []
    for copy in module.graph.find_nodes(op="call_function", target=PEER_COPY):
        node = copy.args[0]
        while node.target in RESHAPES:
            (node,) = node.all_input_nodes
        sent.append((node.op, node.meta["val"].dtype))
    as_it_is, made = ("placeholder", torch.float32), ("call_function", torch.bfloat16)
    assert sent == [as_it_is, as_it_is, made, made]
    shards = module.graph.find_nodes(op="placeholder")[1:5]
    assert [any(user.target is CAST for user in shard.users) for shard in shards] == [
        False,
        False,
        True,
        True,
    ]


def embedded(x: Tensor, table: Tensor, *shards: Tensor) -> list[Tensor]:
    """A stream that starts with rows of a gathered table, and that every layer adds to."""
    rows = collective("all_gather", table.bfloat16(), 2)
    x = rows[x[:, 0].long()] * 2
    for shard in shards:
        weight = collective("all_gather", shard.bfloat16(), 2)
        x = x + (x.sin() @ weight.t()).relu()
    return [x.float()]


def test_a_place_that_a_stream_may_be_read_through_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor writes the rows into all kernels that read the stream."""
    monkeypatch.setattr(order, "AHEAD_BYTES", 0)
    table = torch.randn(WIDTH, WIDTH)
    module, places = prepared(embedded, 2, *inputs(2)[:1], table, *inputs(2)[1:])
    copies = module.graph.find_nodes(op="call_function", target=PEER_COPY)
    used = [copy.args[1] for copy in copies]
    (rows,) = [place for place in used if place.meta["val"].numel() == 2 * table.numel()]
    assert used.count(rows) == 1
    assert len(places) < len(copies) == LAYERS + 1
    late = copies[-1]
    late.args = (late.args[0], rows, *late.args[2:])
    with pytest.raises(InternalError, match="which is written to"):
        check_places(module)


def test_what_leaves_the_graph_is_received_in_memory_of_its_own() -> None:
    def body(x: Tensor, shard: Tensor) -> list[Tensor]:
        weight = collective("all_gather", shard, 2)
        return [x @ weight, weight.view(-1)]

    module, places = prepared(body, 2, torch.randn(4, 8), torch.randn(4, 8))
    assert not places
    assert PEER_COPY not in targets(module)


@pytest.mark.parametrize(
    ("size", "numel", "dtype", "reduce", "copied"),
    [
        (2, SMALL_BYTES, torch.float32, "sum", True),  # two ranks: what NCCL moves, too
        (4, SMALL_BYTES // 12, torch.float32, "sum", True),
        (4, SMALL_BYTES // 4, torch.float32, "sum", False),
        (2, 8, torch.int64, "sum", False),
        (2, 8, torch.float32, "max", False),
    ],
)
def test_which_sums_are_copies(
    size: int, numel: int, dtype: torch.dtype, reduce: str, copied: bool
) -> None:
    def body(x: Tensor, _: Tensor) -> list[Tensor]:
        return [collective("all_reduce", x * 2, size, reduce)]

    module, places = prepared(body, size, torch.ones(numel).to(dtype), torch.ones(1))
    assert (PEER_COPY in targets(module)) is copied
    assert sum(place.numel for place in places) == (size - 1) * numel * copied


def test_a_group_without_peers_keeps_its_collectives() -> None:
    module = overlap(traced(layers(2), *inputs(2)), range(1, LAYERS + 1))
    before = targets(module)
    module, exchange = copy_between_peers(module, {}, range(1, LAYERS + 1), range(LAYERS))
    assert targets(module) == before
    assert exchange == Exchange()


class Opened(NamedTuple):
    module: fx.GraphModule
    exchange: Exchange


def opened(
    size: int, gradients: range, body: Body | None = None, num_layers: int = LAYERS
) -> Opened:
    parameters = range(1, num_layers + 1)
    module = overlap(traced(body or layers(size), *inputs(size, num_layers)), parameters)
    return Opened(*copy_between_peers(module, {GROUP: Peers(1, size)}, parameters, gradients))


def once(x: Tensor, *shards: Tensor) -> list[Tensor]:
    """Gathered weights are read by backward, too, and free as gradients are made."""
    weights = [collective("all_gather", shard.bfloat16(), 2) for shard in shards]
    states = [x]
    for weight in weights:
        states.append((states[-1] @ weight.t()).relu())
    grad, grads = states[-1] * 2, []
    for weight, state in zip(weights[::-1], states[-2::-1], strict=True):
        made, grad = grad.t() @ state, grad @ weight
        grads.append(collective("reduce_scatter", made, 2).float().view(-1, WIDTH))
    return [*grads, grad.float()]


def test_the_last_addition_is_left_to_the_reader() -> None:
    before, made = (opened(2, range(n), once) for n in (0, LAYERS))
    addends = made.exchange.addends
    assert not before.exchange.addends
    assert (
        len(addends) == LAYERS
    )  # the first keeps the place that sums have where no weight is free
    assert len({addend.place for addend in addends.values()}) == len(addends)
    assert [p.numel for p in made.exchange.places] == [p.numel for p in before.exchange.places]
    results = made.module.graph.output_node().args[0]
    for i, result in enumerate(results):
        value = result.meta["val"]
        assert value.dtype is (torch.bfloat16 if i in addends else torch.float32)
        if i in addends:
            assert addends[i].numel == value.numel() == WIDTH * WIDTH // 2
            assert value.is_contiguous() and value.storage_offset() == value.numel()  # rank 1's
    sums = targets(made.module).count(aten.add.Tensor)
    assert targets(before.module).count(aten.add.Tensor) == sums + len(addends)


def test_places_do_not_grow_for_it() -> None:
    """Weights on every rank are not gathered: gradients would have to share places."""

    def replicated(x: Tensor, *weights: Tensor) -> list[Tensor]:
        states = [x]
        whole = [torch.cat([weight, weight]).bfloat16() for weight in weights]
        for weight in whole:
            states.append((states[-1] @ weight.t()).relu())
        grad, grads = states[-1] * 2, []
        for weight, state in zip(whole[::-1], states[-2::-1], strict=True):
            grads.append(collective("all_reduce", grad.t() @ state, 2).float())
            grad = grad @ weight
        return [*grads, grad.float()]

    before, made = (opened(2, range(n), replicated, 12) for n in (0, 12))
    assert made.exchange.places == before.exchange.places and not made.exchange.addends


def random_copies(seed: int, count: int = 40) -> list[_Copy]:
    """Of two types, each in use for a few others; in their order."""
    chance = random.Random(seed)
    graph = fx.Graph()
    copies = []
    for first in range(count):
        node = graph.placeholder(f"x{first}")
        node.meta["val"] = torch.empty(0, dtype=chance.choice([torch.bfloat16, torch.float32]))
        numel, last = chance.choice([1, 8, 64]), first + chance.randrange(1, 12)
        peers, op = Peers(0, 2), CollectiveOp.ALL_GATHER
        copies.append(_Copy(node, node, op, GROUP, peers, numel, first, last))
    return copies


def most_in_use(copies: Sequence[_Copy], kind: tuple[str, torch.dtype]) -> int:
    """Elements of this kind, at any time."""
    alike = [copy for copy in copies if copy.kind == kind]
    times = range(max(copy.last for copy in alike))
    return max(sum(c.numel for c in alike if c.first <= t < c.last) for t in times)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("opened", [0.0, 0.3, 1.0])
def test_no_two_copies_share_a_place_at_a_time(seed: int, opened: float) -> None:
    copies = random_copies(seed)
    chance = random.Random(seed)
    sums = [i for i in range(len(copies)) if chance.random() < opened]
    assigned, plain = _assign(copies, sums), _assign(copies, [])
    assert assigned.kept <= {*sums} and not plain.kept
    for found in (assigned, plain):
        for number, place in enumerate(found.places):
            users = [i for i, n in enumerate(found.numbers) if n == number]
            assert all(copies[i].kind == (place.group, place.dtype) for i in users)
            assert max((copies[i].numel for i in users), default=0) <= place.numel
            for one, other in itertools.pairwise(users):
                assert one not in found.kept and copies[one].last <= copies[other].first
    totals = [sum(p.nbytes for p in found.places) for found in (assigned, plain)]
    assert totals[0] <= 1.05 * totals[1]
    for kind in {copy.kind for copy in copies}:
        total = sum(p.numel for p in plain.places if (p.group, p.dtype) == kind)
        assert most_in_use(copies, kind) <= total <= 1.5 * most_in_use(copies, kind)


def test_small_copies_find_room_between_large_ones() -> None:
    """Whatever comes first."""
    chance = random.Random(0)
    (node,) = (copy.start for copy in random_copies(0, 1))
    peers, op = Peers(0, 2), CollectiveOp.ALL_GATHER
    large = [_Copy(node, node, op, GROUP, peers, 64, first, first + 2) for first in (2, 6)]
    small = [_Copy(node, node, op, GROUP, peers, 8, first, first + 2) for first in (0, 4, 8)]
    for _ in range(10):
        copies = chance.sample(large + small, 5)
        assert [place.numel for place in _assign(copies, []).places] == [64]


def test_sums_of_more_ranks_are_made() -> None:
    assert not opened(4, range(LAYERS)).exchange.addends


def test_what_is_read_in_the_step_is_a_sum() -> None:
    def body(x: Tensor, *shards: Tensor) -> list[Tensor]:
        *grads, grad = once(x, *shards)
        return [*(g * 2 for g in grads), *grads[:-1], grad]

    assert not opened(2, range(2 * LAYERS - 1), body).exchange.addends


def test_addends_are_waited_for_and_stay() -> None:
    made = opened(2, range(LAYERS), once)
    graph = made.module.graph
    places = graph.find_nodes(op="placeholder")[-len(made.exchange.places) :]
    copies = graph.find_nodes(op="call_function", target=PEER_COPY)
    into = {copy.args[1]: copy for copy in copies}  # the last
    kept = [into[places[addend.place]] for addend in made.exchange.addends.values()]
    check_places(made.module, kept)
    gathered = next(copy for copy in copies if copy.args[1] is kept[-1].args[1])
    waits = graph.find_nodes(op="call_function", target=PEER_WAIT)
    last = next(wait for wait in waits[::-1] if wait.args[0] is kept[-1].args[1])
    with pytest.raises(InternalError, match="holds in the end"):
        check_places(made.module, [*kept, gathered])
    graph.erase_node(last)
    with pytest.raises(InternalError, match="holds in the end"):
        check_places(made.module, kept)


def test_readers_at_the_wrong_time_are_found() -> None:
    for wrong in (PEER_WAIT, PEER_COPY):
        module, _ = prepared(layers(2), 2, *inputs(2))
        nodes = list(module.graph.nodes)
        first = next(n for n in nodes if n.target is PEER_WAIT)
        if wrong is PEER_WAIT:  # before it was waited for
            nodes[-1].prepend(first)
        else:  # after it was written again
            place = first.args[0]
            reader = next(n for n in place.users if n.target not in (PEER_WAIT, PEER_COPY))
            copy = next(n for n in nodes if n.target is PEER_COPY and n.args[1] is place)
            with module.graph.inserting_after(reader):
                again = module.graph.call_function(PEER_COPY, copy.args)
            with module.graph.inserting_after(again):
                module.graph.call_function(PEER_WAIT, first.args)
        with pytest.raises(InternalError, match="which is written to"):
            check_places(module)


def test_a_place_is_waited_for_before_it_is_written_again() -> None:
    module, _ = prepared(layers(2), 2, *inputs(2))
    copy = next(n for n in module.graph.nodes if n.target is PEER_COPY)
    with module.graph.inserting_after(copy):
        module.graph.call_function(PEER_COPY, copy.args)
    with pytest.raises(InternalError, match="which is written to"):
        check_places(module)


def test_parts_are_in_the_order_of_the_ranks() -> None:
    assert [part_of_place(rank, 1, own=True) for rank in range(4)] == [0, 1, 2, 3]
    assert [part_of_place(rank, 1, own=False) for rank in (0, 2, 3)] == [0, 1, 2]
