"""Collectives that come once per step become copies between the memories of ranks of one host.

A collective of NCCL is a kernel: it takes some of the multiprocessors from the products that run
beside it, also while it waits for a slower rank, and a product of one wave of tiles then takes two.
Copies by the GPU's copy engines, which wait without a kernel, take none.

    all_gather(x)        each rank copies x to part `rank` of everyone's place, its own too; of
                         parameters alone. A parameter that is cast for it is so where its part
                         lies, and sent from there
    reduce_scatter(x)    each rank copies part j of x to rank j, and adds up what came
    all_reduce(x)        each rank copies x to the others, and adds up: two ranks, or few bytes

Of two ranks' large gradients in bfloat16 the addition is left to who reads them, such as the
optimizer (`Addend`): a sum would be written and read once more. They keep what they have received,
in places that nothing else of the step needs any more.

Sums are taken in the order of the ranks, in float32 at least, and become what reads them in one
kernel. What moves over the wires is what NCCL moves. Places are inputs of the graph beside its own,
which `autopar::peer_copy_` writes into: one that is not read any more is used again, and a copy
starts when every rank has come to it (`ops.peers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import CAST, call, in_dtype
from autopar.compile.overlap import SMALL_BYTES, early_and_late, is_heavy
from autopar.compile.tables import CASTS, SAME_MEMORY, VIEWS, materialize
from autopar.errors import InternalError
from autopar.lowering.collectives import STARTS, collective_of
from autopar.lowering.program import CollectiveOp
from autopar.ops.adamw import ALIGN_BYTES
from autopar.ops.peers import PEER_COPY, PEER_WAIT, part_of_place

aten = torch.ops.aten

_MOST_GROWTH = 1.05  # of the memory of places, for what has arrived to stay there


@dataclass(frozen=True, slots=True)
class Peers:
    """This rank among the ranks of a process group that reach each other's memory."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """A one-dimensional input that the ranks of a group write into."""

    group: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Addend:
    """What is to be added to a result: the first elements of a place, after the last wait."""

    place: int
    numel: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """places: what the inputs are that the graph has beside its own. numbers: of the place of each
    copy. addends: by the position of a result, which is a contiguous bfloat16 tensor then."""

    places: tuple[Place, ...] = ()
    numbers: tuple[int, ...] = ()
    addends: Mapping[int, Addend] = field(default_factory=dict)


def copy_between_peers(
    module: fx.GraphModule,
    groups: Mapping[str, Peers],
    parameters: Collection[int],
    gradients: Collection[int] = (),
) -> tuple[fx.GraphModule, Exchange]:
    """The same values, in place, and where they come from.

    groups: the process groups in which this is possible. parameters: positions of the inputs that
    are there before the step; gradients: of results whose reader takes addends, too. Pre: the order
    of `compile.overlap`. Post: check_places. O(edges).
    """
    copies = _copies(module.graph, groups, parameters)
    results = _open_sums(module.graph, copies, gradients)
    assigned = _assign(copies, results)
    inputs = _add_inputs(module, assigned.places)
    addends: dict[int, Addend] = {}
    arrivals: list[fx.Node] = []
    for position, (copy, number) in enumerate(zip(copies, assigned.numbers, strict=True)):
        is_open = position in assigned.kept
        started = _rewrite(module.graph, copy, inputs[number], is_open=is_open)
        if is_open:
            addends[results[position]] = Addend(number, copy.numel)
            arrivals.append(started)
    module.recompile()
    check_places(module, arrivals)
    return module, Exchange(assigned.places, assigned.numbers, addends)


def check_places(module: fx.GraphModule, arrivals: Sequence[fx.Node] = ()) -> fx.GraphModule:
    """Verifier: a place is read after it was waited for and before it is written again, also by who
    reads what is made of it. arrivals: copies that are read after the last node."""
    module.graph.lint()
    written: dict[fx.Node, fx.Node] = {}  # the last copy into each place
    waited: set[fx.Node] = set()  # places
    # what may be made of places when it is read -> the places, each with the copy that it is from
    seen: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
    for node in module.graph.nodes:
        if node.target is PEER_COPY:
            line, place = node.args[:2]
            if place in written and place not in waited:
                raise InternalError(f"{node.name} writes {place.name}, which is written to")
            seen.pop(line, None)  # what is sent is in memory from here on
            written[place] = node
            waited.discard(place)
            continue
        if node.target is PEER_WAIT:
            waited.add(node.args[0])
            continue
        for read in node.all_input_nodes:
            made = {read: written[read]} if read in written else seen.get(read, {})
            for place, copy in made.items():
                if written[place] is not copy or place not in waited:
                    raise InternalError(f"{node.name} reads {place.name}, which is written to")
            if made and _may_be_read_through(node):
                seen[node] = seen.get(node, {}) | made
    for copy in arrivals:
        held: Any = copy.args[1]
        if held not in waited or written[held] is not copy:
            raise InternalError(f"{copy.name} is not what {held.name} holds in the end")
    return module


@dataclass(frozen=True, slots=True)
class _Copy:
    """A collective to replace. numel: of its place. first, last: how many collectives start before
    it, and before what reads the place last. Nodes are not counted: where shards are padded, ranks
    have more of them or fewer."""

    start: fx.Node
    wait: fx.Node
    op: CollectiveOp
    group: str
    peers: Peers
    numel: int
    first: int
    last: int

    @property
    def kind(self) -> tuple[str, torch.dtype]:
        return self.group, self.start.meta["val"].dtype


def _copies(
    graph: fx.Graph, groups: Mapping[str, Peers], parameters: Collection[int]
) -> list[_Copy]:
    """In their order."""
    early, late = early_and_late(graph, parameters)
    position: dict[fx.Node, int] = {}
    starts: list[fx.Node] = []
    for node in graph.nodes:
        position[node] = len(starts)
        if node.target in STARTS:
            starts.append(node)
    found = []
    for start in starts:
        op, group, reduce = collective_of(start)
        gathers = op is CollectiveOp.ALL_GATHER
        if start not in (early if gathers else late):
            continue
        peers = groups.get(group)
        (wait,) = start.users
        value: Tensor = start.all_input_nodes[0].meta["val"]
        if peers is None or not _is_fit(op, reduce, value, peers):
            continue
        last = _last_read(wait, position, early) if gathers else position[wait]
        if last is None:
            continue
        parts = peers.size if gathers else peers.size - 1
        sent = value.numel() // (peers.size if op is CollectiveOp.REDUCE_SCATTER else 1)
        numel = parts * sent
        found.append(_Copy(start, wait, op, group, peers, numel, position[start], last))
    return found


def _is_fit(op: CollectiveOp, reduce: str, value: Tensor, peers: Peers) -> bool:
    """Whether it is one of the three, and copies move no more than a kernel would."""
    if op is CollectiveOp.ALL_GATHER:
        return True
    sums = reduce == "sum" and value.is_floating_point()
    if op is CollectiveOp.ALL_REDUCE:
        few = value.numel() * value.itemsize * (peers.size - 1) <= SMALL_BYTES
        return sums and (few or peers.size == 2)
    return sums and op is CollectiveOp.REDUCE_SCATTER


def _may_alias(node: fx.Node) -> bool:
    """Whether its result may be the memory of an operand, once Inductor has compiled it."""
    if node.target in VIEWS or node.target in CASTS:
        return True
    schema = getattr(node.target, "_schema", None)
    returns = () if schema is None else schema.returns
    return any(result.alias_info is not None for result in returns)


def _may_be_read_through(node: fx.Node) -> bool:
    """Whether who reads its result may read its operands then: Inductor writes values into the
    kernels that read them, a row of a table of embeddings into every norm of a network. Products,
    collectives and what was made a buffer stay what they are."""
    if node.op == "output" or is_heavy(node) or node.target in (PEER_COPY, PEER_WAIT):
        return False
    return node.target not in STARTS and node.target is not aten.as_strided.default


def _last_read(
    node: fx.Node, position: Mapping[fx.Node, int], early: Collection[fx.Node]
) -> int | None:
    """The position of what reads a value last: by any name, in a kernel that Inductor writes what
    is made of it into, or made of it and parameters alone. None where it leaves the graph."""
    names = _made_of(node, _may_alias)
    if any(user.op == "output" for name in names for user in name.users):
        return None
    made = _made_of(node, lambda user: user in early or _may_be_read_through(user))
    return max(position[user] for value in {*names, *made} for user in value.users)


def _made_of(node: fx.Node, follows: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """A value, and what is made of it by users that `follows` names."""
    found, stack = {node}, [node]
    while stack:
        new = [user for user in stack.pop().users if user not in found and follows(user)]
        found.update(new)
        stack += new
    return found


def _open_sums(
    graph: fx.Graph, copies: Sequence[_Copy], gradients: Collection[int]
) -> dict[int, int]:
    """Positions of copies of sums that may be left open, and of the results that these are."""
    outputs: Any = graph.output_node().args[0]
    found = {}
    for i, copy in enumerate(copies):
        result = None if copy.op is CollectiveOp.ALL_GATHER else _result_of(copy.wait)
        part: Tensor = copy.wait.meta["val"]
        suits = part.dtype is torch.bfloat16 and part.nbytes >= SMALL_BYTES
        suits &= part.nbytes % ALIGN_BYTES == 0  # where that of the second rank begins
        if result is None or not suits or copy.peers.size > 2:
            continue
        if outputs.count(result) == 1 and (position := outputs.index(result)) in gradients:
            found[i] = position
    return found


def _result_of(node: fx.Node) -> fx.Node | None:
    """What the graph returns of a value that is returned in float32 and in its order, and read by
    nothing else."""
    while len(node.users) == 1 and node.meta["val"].is_contiguous():
        (user,) = node.users
        if user.op == "output":
            return node if node.meta["val"].dtype is torch.float32 else None
        if user.target is not CAST and user.target not in VIEWS:
            return None
        node = user
    return None


@dataclass(frozen=True, slots=True)
class _Assigned:
    """numbers: of the place of each copy. kept: positions of copies whose place is not used
    again."""

    numbers: tuple[int, ...]
    places: tuple[Place, ...]
    kept: frozenset[int] = frozenset()


def _assign(copies: Sequence[_Copy], open_sums: Collection[int]) -> _Assigned:
    """Places for all; kept those of open sums, where next to no memory is needed for it."""
    shelf = _Shelf()
    for position in sorted(range(len(copies)), key=lambda i: -copies[i].numel):  # stable
        shelf.put(position, copies[position])
    plain = shelf.assigned()
    for position in open_sums:
        shelf.take(position)
    for position in sorted(open_sums):
        shelf.put(position, copies[position], keep=True)
    keeping = shelf.assigned()
    before, after = (sum(p.nbytes for p in a.places) for a in (plain, keeping))
    return plain if after > _MOST_GROWTH * before else keeping


class _Shelf:
    """Places and when each is in use (a builder, local to one call). Where the largest copies are
    put first, smaller ones find room between them: on two H100s places of a Llama of 24 layers take
    5.4 GiB in place of 7.1 in their order, which is what is in use at once."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._uses: list[dict[int, tuple[int, float]]] = []  # of copies by position: first, last
        self._numbers: dict[int, int] = {}
        self._kept: set[int] = set()

    def put(self, position: int, copy: _Copy, *, keep: bool = False) -> None:
        """Into the smallest place that is free for it, or a new one. keep: for good, if a place is
        free so long."""
        if keep and (free := self._free(copy, math.inf)):
            self._kept.add(position)
            self._use(position, min(free, key=self._numel), (copy.first, math.inf))
            return
        free = self._free(copy, copy.last)
        if not free:
            free = [len(self._places)]
            self._places.append(Place(*copy.kind, copy.numel))
            self._uses.append({})
        self._use(position, min(free, key=self._numel), (copy.first, copy.last))

    def take(self, position: int) -> None:
        del self._uses[self._numbers.pop(position)][position]

    def assigned(self) -> _Assigned:
        numbers = tuple(self._numbers[position] for position in sorted(self._numbers))
        return _Assigned(numbers, tuple(self._places), frozenset(self._kept))

    def _free(self, copy: _Copy, until: float) -> list[int]:
        """Numbers of the places of its kind that it may have from its start on."""
        return [
            number
            for number, (place, uses) in enumerate(zip(self._places, self._uses, strict=True))
            if (place.group, place.dtype) == copy.kind
            and place.numel >= copy.numel
            and all(last <= copy.first or until <= first for first, last in uses.values())
        ]

    def _use(self, position: int, number: int, times: tuple[int, float]) -> None:
        self._numbers[position] = number
        self._uses[number][position] = times

    def _numel(self, number: int) -> int:
        return self._places[number].numel


def _add_inputs(module: fx.GraphModule, places: Sequence[Place]) -> list[fx.Node]:
    """Placeholders behind those that are there."""
    inputs: list[fx.Node] = module.graph.find_nodes(op="placeholder")
    example: Tensor = inputs[0].meta["val"]
    made: list[fx.Node] = []
    for number, place in enumerate(places):
        with module.graph.inserting_after((inputs + made)[-1]):
            node = module.graph.placeholder(f"place_{number}")
        node.meta["val"] = example.new_empty(place.numel, dtype=place.dtype)
        made.append(node)
    return made


def _rewrite(graph: fx.Graph, copy: _Copy, place: fx.Node, *, is_open: bool) -> fx.Node:
    """The call that copies. is_open: the result is this rank's part, the place holds the addend."""
    value = copy.wait.meta["val"]
    scatter = copy.op is CollectiveOp.REDUCE_SCATTER
    own = copy.op is CollectiveOp.ALL_GATHER
    with graph.inserting_before(copy.start):
        sent = copy.start.all_input_nodes[0]
        # a line: Inductor would pass on a gradient of a convolution as that lies, channels last
        line = call(graph, aten.reshape.default, _before_cast(sent) if own else sent, [-1])
        started = call(graph, PEER_COPY, line, place, scatter, own)
    with graph.inserting_before(copy.wait):
        call(graph, PEER_WAIT, place, line)
        received = place
        if place.meta["val"].numel() > copy.numel and not is_open:
            received = call(graph, aten.slice.Tensor, place, 0, 0, copy.numel)
        if own:
            result = call(graph, aten.reshape.default, received, list(value.shape))
            copy.wait.replace_all_uses_with(result)
        elif is_open:
            _put_part(graph, copy, line)
        else:
            _put_sum(graph, copy, line, received)
    graph.erase_node(copy.wait)
    unread = copy.start
    while not unread.users and unread.op != "placeholder":
        (before,) = unread.all_input_nodes
        graph.erase_node(unread)
        unread = before
    return started


def _before_cast(node: fx.Node) -> fx.Node:
    """The input of the graph that this is, in another type, or itself."""
    seen = node
    while seen.target in RESHAPES and len(seen.users) == 1:
        seen = seen.all_input_nodes[0]
    if seen.target is not CAST or len(seen.users) > 1:
        return node
    source, value = seen.all_input_nodes[0], node.meta["val"]
    wide: Tensor = source.meta["val"]
    alike = wide.is_contiguous() and value.is_contiguous() and wide.numel() == value.numel()
    return source if alike and source.op == "placeholder" else node


def _own_part(graph: fx.Graph, copy: _Copy, line: fx.Node) -> fx.Node:
    """Of what this rank sends, what it keeps."""
    numel = copy.wait.meta["val"].numel()
    first = copy.peers.rank * numel if copy.op is CollectiveOp.REDUCE_SCATTER else 0
    return call(graph, aten.slice.Tensor, line, 0, first, first + numel)


def _put_part(graph: fx.Graph, copy: _Copy, line: fx.Node) -> None:
    """This rank's part in the form of the result that the sum would be. Pre: `_result_of`."""
    shape = list(copy.wait.meta["val"].shape)
    part = call(graph, aten.reshape.default, _own_part(graph, copy, line), shape)
    result = _result_of(copy.wait)
    if result is None:
        raise InternalError(f"{copy.wait.name} is not a result")
    for node in [] if result is copy.wait else [*_between(copy.wait, result), result]:
        if node.target in SAME_MEMORY:
            part = call(graph, node.target, part, *node.args[1:])
    _replace(graph, copy.wait, result, part)


def _put_sum(graph: fx.Graph, copy: _Copy, line: fx.Node, received: fx.Node) -> None:
    """The sum over the ranks, in the type and form in which it is read."""
    peers, wire = copy.peers, copy.wait.meta["val"]
    dtype = torch.promote_types(wire.dtype, torch.float32)
    others = call(graph, aten.reshape.default, received, [peers.size - 1, -1])
    total = None
    for rank in range(peers.size):
        if rank == peers.rank:
            part = _own_part(graph, copy, line)
        else:
            part = call(
                graph, aten.select.int, others, 0, part_of_place(rank, peers.rank, own=False)
            )
        part = in_dtype(graph, part, dtype)
        total = part if total is None else call(graph, aten.add.Tensor, total, part)
    if total is None:
        raise InternalError("a group without ranks")
    result = call(graph, aten.reshape.default, total, list(wire.shape))
    cast = _cast_of(copy.wait)
    for view in _between(copy.wait, cast):
        result = call(graph, view.target, result, *view.args[1:])
    replaced = cast or copy.wait
    result = in_dtype(graph, result, replaced.meta["val"].dtype)
    _replace(graph, copy.wait, replaced, result)
    materialize(graph, result)


def _replace(graph: fx.Graph, first: fx.Node, last: fx.Node, made: fx.Node) -> None:
    """The last of a chain of values, each read by the next one alone; the first stays."""
    last.replace_all_uses_with(made)
    while last is not first:
        before = last.all_input_nodes[0]
        graph.erase_node(last)
        last = before


def _cast_of(node: fx.Node) -> fx.Node | None:
    """The cast that alone reads a value, also through views that keep its order."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is CAST:
            return node
        if node.target not in VIEWS or not node.meta["val"].is_contiguous():
            return None
    return None


def _between(first: fx.Node, last: fx.Node | None) -> list[fx.Node]:
    """The views from one to the other, without the two."""
    found: list[fx.Node] = []
    while last is not None and (last := last.all_input_nodes[0]) is not first:
        found.append(last)
    return found[::-1]
