"""The order of a traced program: collectives that come once per step run beside everything else.

    early   collectives that depend on parameters alone (gathers), in the order in which their
            results are read: each starts `AHEAD` of them or `AHEAD_BYTES` before it is read, the
            farther of both, and is waited for where it is read first
    body    in its own order
    late    collectives that no product of matrices waits for (reductions of gradients): each starts
            as soon as its operand is there, and is waited for when `LAG` others have started

Small collectives of the last kind travel together: as many as come until there are `BUCKET_BYTES`
of one type. Everything else stays where it was. Collectives of one group run one after the other:
were all gathers started first, the first one of the body would wait for them.

The order is a function of the graph alone, and gathers start only next to anchors, products and
collectives of the body, which all ranks of a stage have alike, so that their collectives meet.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from autopar.compile.nodes import call, nbytes
from autopar.errors import InternalError
from autopar.lowering.collectives import STARTS, WAIT

aten, functional = torch.ops.aten, torch.ops._c10d_functional

AHEAD = 4
AHEAD_BYTES = 64 << 20
LAG = 2
SMALL_BYTES = 1 << 20  # a collective this small costs its latency, not its bytes
BUCKET_BYTES = 4 << 20

_SCATTER = functional.reduce_scatter_tensor.default
_PACKED = frozenset({functional.all_reduce.default, _SCATTER})


def overlap(module: fx.GraphModule, parameters: Collection[int]) -> fx.GraphModule:
    """The same values in another order. parameters: positions of the inputs that are there before
    the step. Pre: no operator writes into a value. Post: check_order. O(edges)."""
    order = _Order(_Parts(module.graph, parameters))
    order.run()
    return check_order(fx.GraphModule(module, order.graph))


def check_order(module: fx.GraphModule) -> fx.GraphModule:
    """Verifier: every value is made before it is read; every collective is waited for once, nothing
    else reads what it started, and none takes booleans, which Inductor would widen."""
    module.graph.lint()
    for node in module.graph.nodes:
        if node.target in STARTS:
            readers = [user.target for user in node.users]
            if readers != [WAIT]:
                raise InternalError(f"{node.name} is read by {readers}, not by one wait")
            if node.all_input_nodes[0].meta["val"].dtype is torch.bool:
                raise InternalError(f"{node.name} takes booleans: they travel as bytes")
    return module


def is_heavy(node: fx.Node) -> bool:
    """A product of matrices, a convolution or attention: what has a formula for its FLOPs."""
    return getattr(node.target, "overloadpacket", None) in flop_registry


def early_and_late(
    graph: fx.Graph, parameters: Collection[int]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What depends on parameters alone, and the collectives that no product waits for.
    parameters: as in `overlap`."""
    parts = _Parts(graph, parameters)
    return parts.early, parts.late


@dataclass(frozen=True, slots=True)
class _Gather:
    """A collective that starts early. anchor: how many anchors come before its first reader."""

    start: fx.Node
    anchor: int


class _Parts:
    """To which part of the order each node of a graph belongs.

    free: what depends on no input at all. early: on parameters alone. late: collectives that
    nothing heavy waits for; soon: what leads to them and to nothing heavy; after: what they lead
    to.
    """

    def __init__(self, graph: fx.Graph, parameters: Collection[int]) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        calls = [n for n in self.nodes if n.op == "call_function"]
        self.free: set[fx.Node] = set()
        for node in calls:
            if self.free.issuperset(node.all_input_nodes):
                self.free.add(node)
        self.early = self._early({inputs[i] for i in parameters})
        before_heavy = self._before_heavy()
        tail = set(calls) - before_heavy - self.early - self.free
        self.late = {n for n in tail if n.target in STARTS}
        self.soon = _closure(self.late, lambda n: n.all_input_nodes, tail)
        self.after = _closure(self.late, lambda n: n.users, tail)

    def gathers(self) -> list[_Gather]:
        """Collectives of parameters alone, those that are read first first."""
        use: dict[fx.Node, int] = {}
        anchors = [i for i, n in enumerate(self.nodes) if self.is_anchor(n)]
        for node in reversed(self.nodes):
            if node in self.early:
                reads = [use[u] if u in self.early else self.index[u] for u in node.users]
                use[node] = min(reads, default=len(self.nodes))
        starts = [n for n in self.nodes if n in self.early and n.target in STARTS]
        found = [_Gather(n, bisect.bisect_left(anchors, use[n])) for n in starts]
        return sorted(found, key=lambda gather: gather.anchor)

    def is_anchor(self, node: fx.Node) -> bool:
        """Whether it is a product or a collective of the body."""
        return self.is_body(node) and (is_heavy(node) or node.target in STARTS)

    def is_body(self, node: fx.Node) -> bool:
        return not (node in self.early or node in self.free or self.is_late(node))

    def is_late(self, node: fx.Node) -> bool:
        """Whether it is a late collective, or leads to or from one."""
        return node in self.late or node in self.soon or node in self.after

    def _early(self, parameters: Collection[fx.Node]) -> set[fx.Node]:
        known = set(parameters) | self.free
        for node in self.nodes:
            if node.op == "call_function" and known.issuperset(node.all_input_nodes):
                known.add(node)
        return known - set(parameters) - self.free

    def _before_heavy(self) -> set[fx.Node]:
        """Heavy nodes, and those that one waits for."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if is_heavy(node) or not found.isdisjoint(node.users):
                found.add(node)
        return found


def _closure(
    start: Iterable[fx.Node],
    following: Callable[[fx.Node], Iterable[fx.Node]],
    within: Collection[fx.Node],
) -> set[fx.Node]:
    """What is reached from `start` inside `within`, without `start` itself unless it is reached."""
    found: set[fx.Node] = set()
    stack = list(start)
    while stack:
        new = [n for n in following(stack.pop()) if n in within and n not in found]
        found.update(new)
        stack += new
    return found


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Late collectives that travel as one. started: the node of the new graph."""

    members: tuple[fx.Node, ...]
    started: fx.Node


class _Order:
    """A new graph, node by node (a builder, local to one call)."""

    def __init__(self, parts: _Parts) -> None:
        self.graph = fx.Graph()
        self._parts = parts
        self._made: dict[fx.Node, fx.Node] = {}
        self._started: deque[_Parcel] = deque()
        self._buckets: dict[tuple[Any, ...], list[fx.Node]] = {}
        self._gathers = deque(parts.gathers())
        self._ahead: deque[_Gather] = deque()

    def run(self) -> None:
        parts = self._parts
        for node in parts.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._emit(node)
        anchors = 0
        self._gather_until(anchors)
        for node in parts.nodes:
            if node.op == "call_function" and parts.is_body(node):
                self._emit(node)
                if parts.is_anchor(node):
                    anchors += 1
                    self._gather_until(anchors)
                self._follow(node)
        self._gather_until(len(parts.nodes))
        while self._buckets or self._started:
            for key in list(self._buckets):
                self._send(self._buckets.pop(key))
            while self._started:
                self._finish(self._started.popleft())
        self._emit(parts.nodes[-1])

    def _gather_until(self, anchor: int) -> None:
        """Starts what is read before or by this anchor, and what goes ahead of it."""
        while self._ahead and self._ahead[0].anchor <= anchor:
            self._ahead.popleft()
        while self._gathers and (
            self._gathers[0].anchor <= anchor
            or len(self._ahead) < AHEAD
            or sum(nbytes(g.start) for g in self._ahead) < AHEAD_BYTES
        ):
            gather = self._gathers.popleft()
            self._emit(gather.start)
            if gather.anchor > anchor:
                self._ahead.append(gather)

    def _emit(self, node: fx.Node) -> None:
        """The node, after what it reads."""
        stack = [node]
        while stack:
            missing = [n for n in stack[-1].all_input_nodes if n not in self._made]
            if missing:
                stack += reversed(missing)
                continue
            top = stack.pop()
            if top not in self._made:
                self._made[top] = self.graph.node_copy(top, self._made.__getitem__)

    def _follow(self, node: fx.Node) -> None:
        """Emits what belongs to late collectives and is ready now that `node` is there, always the
        first one of the graph as it was: ranks may have chains of different lengths, but all have
        them in one order."""
        parts = self._parts
        ready: list[tuple[int, fx.Node]] = []

        def wake(source: fx.Node) -> None:
            for user in source.users:
                if user not in self._made and parts.is_late(user) and self._is_ready(user):
                    heapq.heappush(ready, (parts.index[user], user))

        wake(node)
        while ready:
            _, first = heapq.heappop(ready)
            if first in self._made:
                continue
            if first in parts.late:
                self._post(first)
            else:
                self._emit(first)
                wake(first)

    def _is_ready(self, node: fx.Node) -> bool:
        parts = self._parts
        return all(
            n in self._made or n in parts.early or n in parts.free for n in node.all_input_nodes
        )

    def _post(self, node: fx.Node) -> None:
        """Starts a late collective, or puts it with others. A packed one counts as made once it
        travels, so that nothing reads it before."""
        operand = node.all_input_nodes[0]
        value: Tensor = operand.meta["val"]
        packed = node.target in _PACKED and nbytes(operand) <= SMALL_BYTES
        key = (node.target, value.dtype, *node.args[1:]) if packed else (node,)
        bucket = self._buckets.setdefault(key, [])
        if node not in bucket:
            bucket.append(node)
        if not packed or sum(nbytes(n.all_input_nodes[0]) for n in bucket) >= BUCKET_BYTES:
            self._send(self._buckets.pop(key))

    def _send(self, members: Sequence[fx.Node]) -> None:
        if len(members) == 1:
            self._emit(members[0])
            started = self._made[members[0]]
        else:
            operands = [n.all_input_nodes[0] for n in members]
            for operand in operands:
                self._emit(operand)
            started = _pack(self.graph, members[0], [self._made[o] for o in operands])
            self._made.update(dict.fromkeys(members, started))
        self._started.append(_Parcel(tuple(members), started))
        while len(self._started) > LAG:
            self._finish(self._started.popleft())

    def _finish(self, parcel: _Parcel) -> None:
        """Waits, and goes on with what the values are for."""
        waits = [next(iter(member.users)) for member in parcel.members]
        if len(waits) == 1:
            self._emit(waits[0])
        else:
            metas: list[Tensor] = [wait.meta["val"] for wait in waits]
            self._made.update(zip(waits, _unpack(self.graph, parcel.started, metas), strict=True))
        for wait in waits:
            self._follow(wait)


def _pack(graph: fx.Graph, member: fx.Node, operands: Sequence[fx.Node]) -> fx.Node:
    """One collective like `member` for all operands: side by side for each rank that gets a part of
    every one."""
    rows = member.args[2] if member.target is _SCATTER else 1
    flat = [call(graph, aten.reshape.default, node, [rows, -1]) for node in operands]
    joined = call(graph, aten.cat.default, flat, 1)
    line = call(graph, aten.reshape.default, joined, [-1])
    return call(graph, member.target, line, *member.args[1:])


def _unpack(graph: fx.Graph, started: fx.Node, metas: Sequence[Tensor]) -> list[fx.Node]:
    """The results of the members of `_pack`."""
    line = call(graph, WAIT, started)
    parts, first = [], 0
    for meta in metas:
        part = call(graph, aten.slice.Tensor, line, 0, first, first + meta.numel())
        parts.append(call(graph, aten.reshape.default, part, list(meta.shape)))
        first += meta.numel()
    return parts
