"""Passes that bring a traced graph to normal form: fewer kinds of operators, none of them
surprising.

Normal form: no aliasing or assertion operators; a bias is added by an `add` of its own, so that a
sharded contraction adds it once; a mean loss is a sum divided by its weight, so that both parts can
be partial sums; max-pools keep offsets in their windows, and a relu before one no operand
(`graph.pools`); random numbers are hashes of a seed (`graph.randomness`); views and casts are made
once per module and phase; everything is read by something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autopar.graph.casts import read_narrow_scores
from autopar.graph.pools import masks_before_pools, pools_by_offsets
from autopar.graph.program import (
    Graph,
    InputKind,
    Operator,
    Phase,
    Ref,
    TensorMeta,
    check_graph,
)
from autopar.graph.randomness import seeded_random
from autopar.graph.rewrite import Rewrite, derived, rewrite_graph
from autopar.graph.work import is_view

aten = torch.ops.aten

_IDENTITIES = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
    }
)
_CHECKS = frozenset(
    {
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
    }
)
_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int})
_REDUCE_MEAN, _REDUCE_SUM = 1, 2  # at::Reduction


def normalize(graph: Graph) -> Graph:
    """All passes in order; the verifier runs after each."""
    traced = graph
    for normal_pass in _PASSES:
        graph = check_graph(normal_pass(graph))
    return check_graph(repair_partners(graph, traced))


def drop_identities(graph: Graph) -> Graph:
    """detach, alias and views that change nothing become their operand; assertions vanish."""
    metas = graph.metas()

    def step(op: Operator) -> Rewrite | None:
        if op.target in _CHECKS:
            return Rewrite()
        source = next(iter(op.operands), None)
        if source is None or not (op.target in _IDENTITIES or _keeps_everything(op, metas[source])):
            return None
        return Rewrite(results={0: source})

    return rewrite_graph(graph, step)


def _keeps_everything(op: Operator, source: TensorMeta) -> bool:
    """A view or expand to the same shape, or a slice over the whole dim."""
    if op.target in (aten.view.default, aten._unsafe_view.default, aten.expand.default):
        return op.results[0] == source
    if op.target is aten.slice.Tensor:
        step = op.args[4] if len(op.args) > 4 else 1
        return op.results[0] == source and step == 1
    return False


def fold_double_transposes(graph: Graph) -> Graph:
    """t(t(x)) is x: linear layers leave these in backward. Across phases too."""
    made: dict[Ref, Operator] = {}

    def step(op: Operator) -> Rewrite | None:
        if op.target not in _TRANSPOSES:
            return None
        inner = made.get(op.args[0])
        if inner is not None and inner.target is op.target and _same_dims(inner, op):
            return Rewrite(results={0: inner.args[0]})
        made[Ref(op.name)] = op
        return None

    return rewrite_graph(graph, step)


def _same_dims(first: Operator, second: Operator) -> bool:
    assert first.results[0] is not None
    rank = len(first.results[0].shape)
    return {d % rank for d in first.args[1:]} == {d % rank for d in second.args[1:]}


def split_biased_matmuls(graph: Graph) -> Graph:
    """addmm(b, x, w) = x @ w * alpha + b * beta, and baddbmm likewise. The matmul keeps the name,
    so that it stays the partner of its gradient matmuls."""
    plain = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}

    def step(op: Operator) -> Rewrite | None:
        if op.target not in plain:
            return None
        bias, lhs, rhs = op.args[:3]
        meta = op.results[0]
        steps = [derived(op, op.name, plain[op.target], (lhs, rhs), meta)]
        alpha, beta = op.kwargs.get("alpha", 1), op.kwargs.get("beta", 1)
        if alpha != 1:
            steps.append(_scaled(op, "alpha", Ref(op.name), alpha, meta))
        product = Ref(steps[-1].name)
        if beta == 0:
            return Rewrite(tuple(steps), {0: product})
        if beta != 1:
            steps.append(_scaled(op, "beta", bias, beta, metas[bias]))
            bias = Ref(steps[-1].name)
        steps.append(derived(op, f"{op.name}_bias", aten.add.Tensor, (product, bias), meta))
        return Rewrite(tuple(steps), {0: Ref(steps[-1].name)})

    metas = graph.metas()
    return rewrite_graph(graph, step)


def _scaled(op: Operator, suffix: str, ref: Ref, by: Any, meta: TensorMeta | None) -> Operator:
    return derived(op, f"{op.name}_{suffix}", aten.mul.Tensor, (ref, by), meta)


def split_mean_losses(graph: Graph) -> Graph:
    """nll_loss(mean) = nll_loss(sum) / total_weight; its gradient divides the incoming one."""
    forwards = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}
    backwards = {aten.nll_loss_backward.default, aten.nll_loss2d_backward.default}

    def step(op: Operator) -> Rewrite | None:
        if op.target in forwards and op.args[3] == _REDUCE_MEAN:
            summed = replace(op, args=(*op.args[:3], _REDUCE_SUM, *op.args[4:]))
            parts = (Ref(op.name), Ref(op.name, 1))
            mean = derived(op, f"{op.name}_mean", aten.div.Tensor, parts, op.results[0])
            return Rewrite((summed, mean), {0: Ref(mean.name)})
        if op.target in backwards and op.args[4] == _REDUCE_MEAN:
            weight = op.args[6]
            grad = (op.args[0], weight)
            meta = metas[op.args[0]]
            scaled = derived(op, f"{op.name}_scaled", aten.div.Tensor, grad, meta)
            args = (Ref(scaled.name), *op.args[1:4], _REDUCE_SUM, *op.args[5:])
            return Rewrite((scaled, replace(op, args=args)))
        return None

    metas = graph.metas()
    return rewrite_graph(graph, step)


def wide_batch_statistics(graph: Graph) -> Graph:
    """Batch norm of a narrow input with float32 running statistics returns float32 ones; torch's
    shape function says that they are as narrow as the input."""
    metas = graph.metas()

    def step(op: Operator) -> Rewrite | None:
        if op.target is not aten._native_batch_norm_legit_functional.default:
            return None
        dtype = metas[op.args[3]].dtype
        out, *statistics = op.results
        wide = tuple(None if m is None else TensorMeta(m.shape, dtype) for m in statistics)
        return None if op.results[1:] == wide else Rewrite((replace(op, results=(out, *wide)),))

    return rewrite_graph(graph, step)


def merge_repeated_views(graph: Graph) -> Graph:
    """The same view or cast of the same value is made once per module call and phase. Never across
    modules: layers that look alike must stay alike."""
    first: dict[tuple[Any, ...], Ref] = {}

    def step(op: Operator) -> Rewrite | None:
        if not is_view(op) and op.target is not aten._to_copy.default:
            return None
        kwargs = sorted(op.kwargs.items())
        key = (op.target, repr(op.args), repr(kwargs), op.phase, op.module, bool(op.forward))
        known = first.setdefault(key, Ref(op.name))
        if known.name == op.name:
            return None
        return Rewrite(results={i: Ref(known.name, i) for i in range(len(op.results))})

    return rewrite_graph(graph, step)


def drop_dead(graph: Graph) -> Graph:
    """Operators that no output needs. No operator of a functional graph has an effect."""
    live = {out.ref.name for out in graph.outputs}
    kept = []
    for op in reversed(graph.operators):
        if op.name in live:
            kept.append(op)
            live.update(ref.name for ref in op.operands)
    return replace(graph, operators=tuple(reversed(kept)))


def drop_dead_constants(graph: Graph) -> Graph:
    """Constants that nothing reads. Parameters, buffers and batch tensors stay: they are the
    contract."""
    read = {ref for op in graph.operators for ref in op.operands}
    read.update(out.ref for out in graph.outputs)
    inputs = tuple(i for i in graph.inputs if i.kind is not InputKind.CONSTANT or i.ref in read)
    names = {i.name for i in inputs}
    constants = {name: data for name, data in graph.constants.items() if name in names}
    return replace(graph, inputs=inputs, constants=constants)


def repair_partners(graph: Graph, traced: Graph) -> Graph:
    """A partner that a pass removed is replaced by the nearest earlier forward operator of the same
    module call that is left, else the nearest later one, else the nearest of all. O(operators)."""
    left = {op.name for op in graph.operators}
    stand_in: dict[str, str] = {}
    forward = [op for op in traced.operators if op.phase is Phase.FORWARD]
    for scope in (lambda op: op.module, lambda op: None):
        _nearest_survivors(forward, left, stand_in, scope)
        _nearest_survivors(forward[::-1], left, stand_in, scope)
    operators = tuple(
        replace(op, forward=stand_in.get(op.forward, "")) if op.forward not in left | {""} else op
        for op in graph.operators
    )
    return graph.with_operators(operators)


def _nearest_survivors(
    operators: list[Operator],
    left: set[str],
    stand_in: dict[str, str],
    scope: Callable[[Operator], Any],
) -> None:
    """Give each removed operator without a stand-in the last survivor before it in its scope."""
    last: dict[Any, str] = {}
    for op in operators:
        if op.name in left:
            last[scope(op)] = op.name
        elif scope(op) in last:
            stand_in.setdefault(op.name, last[scope(op)])


_PASSES: tuple[Callable[[Graph], Graph], ...] = (
    drop_identities,
    fold_double_transposes,
    split_biased_matmuls,
    split_mean_losses,
    wide_batch_statistics,
    pools_by_offsets,
    masks_before_pools,
    seeded_random,
    read_narrow_scores,
    merge_repeated_views,
    drop_dead,
    drop_dead_constants,
)
