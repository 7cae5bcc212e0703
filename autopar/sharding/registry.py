"""The table of rules: operator overload -> rule function, merged from the families.

The table is built once at import and never changes. An operator that is not in it is replicated,
and `rule_for` says so in `Rule.fallback`, which the planner reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from autopar.errors import InternalError
from autopar.graph.program import Graph, InputKind, Operator, Ref, TensorMeta, iter_refs, map_refs
from autopar.layout import Dims, raw_dims, shape_of
from autopar.sharding.rule import Call, Rule, Slot, replicate_rule

RuleFn = Callable[[Call], Rule]


@lru_cache(maxsize=1)
def rules() -> Mapping[object, RuleFn]:
    """Every rule of every family."""
    from autopar.sharding.rules import FAMILIES

    table: dict[object, RuleFn] = {}
    for name, family in FAMILIES.items():
        twice = table.keys() & family.keys()
        if twice:
            raise InternalError(f"family {name} redefines {sorted(map(str, twice))}")
        table.update(family)
    return MappingProxyType(table)


def rule_for(call: Call) -> Rule:
    """The rule of a call, checked against its operands and results. Pure: see RuleCache."""
    function = rules().get(call.target)
    if function is None:
        rule = replicate_rule(call, fallback=True)
    elif any(0 in dim for dims in call.operands for dim in dims):  # empty: nothing to share
        rule = replicate_rule(call)
    else:
        rule = function(call)
    for dims, meta in zip(rule.results, call.results, strict=True):
        shapes = (None if dims is None else shape_of(dims), None if meta is None else meta.shape)
        if shapes[0] != shapes[1]:
            raise InternalError(f"rule of {call.target} gives dims {dims} to a result {meta}")
    return rule


def _frozen(tree: Any) -> Any:
    """The same nest, hashable."""
    if isinstance(tree, (list, tuple)) and not isinstance(tree, (Ref, Slot)):
        return tuple(_frozen(item) for item in tree)
    if isinstance(tree, slice):
        return ("slice", tree.start, tree.stop, tree.step)
    return tree


class RuleTable:
    """Rules of one graph: the Call and Rule of every operator and the dims of every value.

    Built in one pass in execution order, memoised by signature. O(operators).
    fallbacks: operator name -> overload for those that no rule covers.
    """

    def __init__(self, graph: Graph, input_dims: Mapping[str, Dims] | None = None) -> None:
        self.dims: dict[Ref, Dims] = {}
        self.calls: dict[str, Call] = {}
        self.rules: dict[str, Rule] = {}
        self.fallbacks: dict[str, str] = {}
        memo: dict[Any, Rule] = {}
        metas = graph.metas()
        exact = _exact_values(graph)
        for inp in graph.inputs:
            self.dims[inp.ref] = (input_dims or {}).get(inp.name) or raw_dims(inp.meta.shape)
        for op in graph.operators:
            call = make_call(op, self.dims, metas, exact)
            key = (
                call.target,
                call.args,
                call.kwargs,
                call.operands,
                call.dtypes,
                call.results,
                call.same,
                call.exact,
            )
            rule = memo.get(key)
            if rule is None:
                rule = memo[key] = rule_for(call)
            self.calls[op.name] = call
            self.rules[op.name] = rule
            if rule.fallback:
                self.fallbacks[op.name] = op.op_name
            for index, dims in enumerate(rule.results):
                if dims is not None:
                    self.dims[Ref(op.name, index)] = dims


def make_call(
    op: Operator, dims: Mapping[Ref, Dims], metas: Mapping[Ref, TensorMeta], exact: set[Ref]
) -> Call:
    """The signature of one operator."""
    operands = op.operands
    numbers = iter(range(len(operands)))
    args, kwargs = map_refs((op.args, dict(op.kwargs)), lambda _: Slot(next(numbers)))
    first = {ref: i for i, ref in reversed(list(enumerate(operands)))}
    return Call(
        target=op.target,
        args=_frozen(args),
        kwargs=tuple((k, _frozen(v)) for k, v in kwargs.items()),
        operands=tuple(dims[ref] for ref in operands),
        dtypes=tuple(metas[ref].dtype for ref in operands),
        results=op.results,
        same=tuple(first[ref] for ref in operands),
        exact=bool(op.refs) and op.refs[0] in exact,
    )


def _exact_values(graph: Graph) -> set[Ref]:
    """Values that depend on no parameter and no floating-point input: positions, masks, buckets."""
    exact: set[Ref] = set()
    for inp in graph.inputs:
        floating = inp.meta.dtype.is_floating_point and inp.kind is not InputKind.CONSTANT
        if inp.kind is not InputKind.PARAMETER and not floating:
            exact.add(inp.ref)
    for op in graph.operators:
        if all(ref in exact for ref in iter_refs((op.args, dict(op.kwargs)))):
            exact.update(op.refs)
    return exact
