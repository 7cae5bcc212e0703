"""Scores that a model widens for its loss, as transformers does, are read as narrow as they are.

    cross_entropy(view(float32(x)))             ->  cross_entropy(view(x))
    bfloat16(view(float32(x))), x bfloat16      ->  view(x)

The operator computes in float32 by itself (`ops.cross_entropy`), so that the wide copy of a table
of [tokens, vocabulary], and its gradient, are never made.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import autopar.ops  # noqa: F401  (registers autopar::cross_entropy)
from autopar.graph.program import Graph, Operator, Ref, TensorMeta
from autopar.graph.rewrite import Rewrite, derived, rewrite_graph
from autopar.graph.work import is_view

aten, own = torch.ops.aten, torch.ops.autopar

_SCORES = {own.cross_entropy.default: 0, own.cross_entropy_backward.default: 1}


def read_narrow_scores(graph: Graph) -> Graph:
    """The two rules above. What is left unread is dead. O(edges)."""
    reader = _Reader(graph)
    return rewrite_graph(graph, reader.step)


class _Reader:
    """What a walk over a graph has seen (local to one call)."""

    def __init__(self, graph: Graph) -> None:
        self._metas = dict(graph.metas())
        self._made: dict[Ref, Operator] = {}
        self._narrow: dict[Ref, Ref] = {}  # a view of a widened value -> that of the value itself

    def step(self, op: Operator) -> Rewrite | None:
        change = self._change(op)
        for new in (op,) if change is None else change.operators:
            for ref in new.refs:
                meta = new.results[ref.index]
                assert meta is not None
                self._made[ref], self._metas[ref] = new, meta
        return change

    def _change(self, op: Operator) -> Rewrite | None:
        if op.target in _SCORES:
            return self._loss(op, _SCORES[op.target])
        if _is_cast(op):
            narrow, views = self._before_widening(op.args[0])
            if narrow is not None and self._metas[narrow].dtype == op.kwargs["dtype"]:
                return Rewrite(tuple(views), {0: narrow})
        return None

    def _loss(self, op: Operator, position: int) -> Rewrite | None:
        scores, views = self._before_widening(op.args[position])
        if scores is None:
            return None
        args = (*op.args[:position], scores, *op.args[position + 1 :])
        if op.target is own.cross_entropy.default:
            return Rewrite((*views, op.changed(args=args)))
        (wide,) = op.results
        assert wide is not None
        reads = op.changed(args=args, results=(TensorMeta(wide.shape, self._metas[scores].dtype),))
        name = f"{op.name}_wide"
        cast = derived(op, name, aten._to_copy.default, (Ref(op.name),), wide)
        cast = replace(cast, kwargs={"dtype": wide.dtype})
        return Rewrite((*views, reads, cast), {0: Ref(name)})

    def _before_widening(self, ref: Ref) -> tuple[Ref | None, list[Operator]]:
        """The value before it was widened, seen as `ref` sees it, and the views to make for it;
        None where nothing was widened."""
        chain: list[Operator] = []
        while ref not in self._narrow:
            op = self._made.get(ref)
            if op is not None and _is_cast(op) and self._widens(op):
                self._narrow[ref] = op.args[0]
            elif op is not None and is_view(op) and len(op.results) == len(op.operands) == 1:
                chain.append(op)
                ref = op.operands[0]
            else:
                return None, []
        made = []
        for view in reversed(chain):
            (meta,), source = view.results, self._narrow[view.operands[0]]
            assert meta is not None
            narrow = TensorMeta(meta.shape, self._metas[source].dtype)
            twin = derived(
                view, f"{view.name}_narrow", view.target, (source, *view.args[1:]), narrow
            )
            made.append(twin)
            self._narrow[Ref(view.name)] = Ref(twin.name)
            self._metas[Ref(twin.name)] = narrow
            ref = Ref(view.name)
        return self._narrow[ref], made

    def _widens(self, op: Operator) -> bool:
        """Without loss, so that narrowing it again gives the value back."""
        old, new = self._metas[op.args[0]].dtype, op.kwargs["dtype"]
        return old in (torch.bfloat16, torch.float16) and new is torch.float32


def _is_cast(op: Operator) -> bool:
    is_copy = op.target is aten._to_copy.default
    return is_copy and "dtype" in op.kwargs and op.kwargs.keys() <= {"dtype", "layout", "device"}
