"""Save or recompute: which forward values are kept for backward, decided by a minimum cut.

The pass rewrites the graph: forward operators whose values are not kept get a copy in the backward
phase, just before its first reader. Afterwards the values that cross from forward to backward are
exactly the saved ones, so that the planner, the memory model and the lowering need no further
notion of rematerialisation.

    minimise   sum of bytes(v) over kept values v
    such that  every value that backward reads is kept, or recomputed from kept values and graph
    inputs
               by operators that the policy allows

Compiled programs compute some values in their readers whatever the policy (`graph.inline`): these
may always be recomputed, at no cost.

One cut per layer: a layer's inputs from other layers are kept or unread, never recomputed across
the boundary. Parameters, constants and batch inputs cost nothing. (Minimum cut as in min-cut
rematerialisation: Horace He, Shangdi Yu, "Transcending runtime-memory tradeoffs in checkpointing
by being fusion aware", MLSys 2023.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

import networkx as nx
import torch

import autopar.ops  # noqa: F401  (registers autopar::cross_entropy)
from autopar.graph.inline import inlined
from autopar.graph.program import Graph, Operator, Phase, Ref, check_graph
from autopar.graph.work import is_contraction, is_view
from autopar.plan import Remat

aten = torch.ops.aten


# Expensive although they have no FLOPs in torch's registry.
_EXPENSIVE = {
    aten._softmax.default,
    aten._safe_softmax.default,
    aten._log_softmax.default,
    torch.ops.autopar.cross_entropy.default,
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten.native_group_norm.default,
    aten._native_batch_norm_legit_functional.default,
    aten.embedding.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.cumsum.default,
    aten.sort.default,
    aten.topk.default,
    aten.max_pool2d_with_indices.default,
    torch.ops.autopar.max_pool.default,
}

_SOURCE, _SINK = "source", "sink"
_VIEW_PENALTY = 1.001  # prefers keeping the base of a view, which others may read as well
_COPY_SUFFIX = "__re"


def may_recompute(op: Operator, policy: Remat) -> bool:
    """Whether the policy lets backward run this forward operator again."""
    if is_view(op) or not op.operands:
        return True
    if policy is Remat.NONE:
        return False
    return policy is Remat.FULL or not (is_contraction(op) or op.target in _EXPENSIVE)


def _may_remake(op: Operator, policy: Remat, free: frozenset[str]) -> bool:
    return op.name in free or may_recompute(op, policy)


def apply_recompute(
    graph: Graph, policies: Remat | Sequence[Remat], *, compiled: bool = False
) -> Graph:
    """policies: of each layer, or one for all. compiled: the programs will be.

    Pre: layers are set. Post: check_graph; backward reads only saved values, graph inputs and
    backward values. O(sum over layers of a max-flow)."""
    if isinstance(policies, Remat):
        policies = (policies,) * len(graph.layer_names)
    free = inlined(graph) if compiled else frozenset()
    kept = _kept_values(graph, policies, free)
    made_by = {ref: op for op in graph.operators for ref in op.refs}
    copies: dict[tuple[str, int], str] = {}
    operators: list[Operator] = []

    def use(ref: Ref, layer: int) -> Ref:
        """The value as backward of `layer` reads it: kept, or made by a copy emitted here."""
        op = made_by.get(ref)
        if op is None or op.phase is Phase.BACKWARD or ref in kept:
            return ref
        if (op.name, layer) not in copies:
            suffix = _COPY_SUFFIX if layer == op.layer else f"{_COPY_SUFFIX}{layer}"
            copy = op.reading(
                lambda r: use(r, layer),
                name=op.name + suffix,
                phase=Phase.BACKWARD,
                forward=op.name,
                layer=layer,
                recompute=True,
                inlined=op.name in free,
            )
            operators.append(copy)
            copies[op.name, layer] = copy.name
        return Ref(copies[op.name, layer], ref.index)

    for op in graph.operators:
        if op.phase is Phase.FORWARD:
            operators.append(op)
            continue
        operators.append(op.reading(partial(use, layer=op.layer)))
    return check_graph(graph.with_operators(tuple(operators)))


def _kept_values(graph: Graph, policies: Sequence[Remat], free: frozenset[str]) -> set[Ref]:
    """Union of the layers' cuts. What backward of another layer reads is cut under NONE: only views
    are remade across a boundary. free: operators that may always run again, in their own layer."""
    forward: dict[int, list[Operator]] = {}
    for op in graph.operators:
        if op.phase is Phase.FORWARD:
            forward.setdefault(op.layer, []).append(op)
    made_by = {ref: op for op in graph.operators for ref in op.refs}
    near, far = _backward_reads(graph, made_by)
    nbytes = {ref: meta.nbytes for ref, meta in graph.metas().items()} | dict(graph.weights)
    kept: set[Ref] = set()
    # later layers first: what their copies read from earlier layers is wanted there
    for layer in sorted(forward, reverse=True):
        ops = forward[layer]
        own = {ref for op in ops for ref in op.refs}
        only_views = partial(may_recompute, policy=Remat.NONE)
        by_policy = partial(_may_remake, policy=policies[layer], free=free)
        for targets, allowed in ((far & own, only_views), (near & own, by_policy)):
            cut = _minimum_cut(ops, targets, allowed, nbytes.__getitem__, made_by)
            kept |= cut
            far |= cut - own
    return kept


def _backward_reads(graph: Graph, made_by: dict[Ref, Operator]) -> tuple[set[Ref], set[Ref]]:
    """Forward values that backward reads: in the layer that makes them, and in other layers."""
    near: set[Ref] = set()
    far: set[Ref] = set()
    for op in graph.operators:
        if op.phase is Phase.BACKWARD:
            for ref in op.operands:
                maker = made_by.get(ref)
                if maker is not None and maker.phase is Phase.FORWARD:
                    (near if maker.layer == op.layer else far).add(ref)
    return near, far


def _minimum_cut(
    ops: Iterable[Operator],
    targets: set[Ref],
    allowed: Callable[[Operator], bool],
    nbytes: Callable[[Ref], int],
    made_by: dict[Ref, Operator],
) -> set[Ref]:
    """The cheapest set of values from which the allowed operators can remake the targets."""
    if not targets:
        return set()
    needed = _needed(ops, targets, allowed)
    numbers: dict[Ref, int] = {}
    for op in needed.values():
        for ref in (*op.operands, *op.refs):
            numbers.setdefault(ref, len(numbers))
    costs, sources = [], []
    for ref, number in numbers.items():
        maker = made_by.get(ref)
        cost = 0.0 if maker is None else float(nbytes(ref))
        costs.append(cost * _VIEW_PENALTY if maker is not None and is_view(maker) else cost)
        if maker is None or maker.name not in needed or not allowed(maker):
            sources.append(number)
    edges = [
        (numbers[ref], numbers[result])
        for op in needed.values()
        if allowed(op)
        for ref in op.operands
        for result in op.refs
    ]
    sinks = sorted(numbers[ref] for ref in targets)
    cut = _cut_network(tuple(costs), tuple(sources), tuple(edges), tuple(sinks))
    return {ref for ref, number in numbers.items() if number in cut and ref in made_by}


@lru_cache(maxsize=512)
def _cut_network(
    costs: tuple[float, ...],
    sources: tuple[int, ...],
    edges: tuple[tuple[int, int], ...],
    sinks: tuple[int, ...],
) -> frozenset[int]:
    """The cheapest values that part sinks from sources. Equal layers ask for equal cuts."""
    if not sources:
        return frozenset()
    network = nx.DiGraph()
    for number, cost in enumerate(costs):
        network.add_edge((number, "in"), (number, "out"), capacity=cost)
    for number in sources:
        network.add_edge(_SOURCE, (number, "in"))  # no capacity: infinite
    for one, two in edges:
        network.add_edge((one, "out"), (two, "in"))
    for number in sinks:
        network.add_edge((number, "out"), _SINK)
    _, (near, far) = nx.minimum_cut(network, _SOURCE, _SINK)
    return frozenset(
        number for number in range(len(costs)) if (number, "in") in near and (number, "out") in far
    )


def _needed(
    ops: Iterable[Operator], targets: set[Ref], allowed: Callable[[Operator], bool]
) -> dict[str, Operator]:
    """Operators that make a target or could take part in remaking one."""
    wanted = set(targets)
    needed: dict[str, Operator] = {}
    for op in reversed(list(ops)):
        if any(ref in wanted for ref in op.refs):
            needed[op.name] = op
            if allowed(op):
                wanted.update(op.operands)
    return needed
