"""The table of rules: operator overload -> rule function, merged from the families.

The table is built once at import and never changes. An operator that is not in it has the rule that
a user registered, or the one that is found by running it, or is replicated; `Rule.origin` says
which, and the plan reports it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from autopar.errors import InternalError, OptionError
from autopar.graph.program import Graph, InputKind, Operator, Ref, TensorMeta
from autopar.layout import Dims, raw_dims, shape_of
from autopar.sharding.discover import discovered_rule
from autopar.sharding.lettering import Lettering
from autopar.sharding.registered import (
    REGISTERED,
    check_on_example,
    fits_schema,
    registered_rule,
    resolve,
)
from autopar.sharding.rule import Call, Origin, Rule, Slot, replicate_rule

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
    """The rule of a call, checked against its operands and results. Pure: see RuleTable."""
    rule = None
    if any(0 in dim for dims in call.operands for dim in dims):  # empty: nothing to share
        rule = replicate_rule(call)
    else:
        rule = registered_rule(call)
    if rule is None:
        function = rules().get(call.target)
        rule = discovered_rule(call) if function is None else function(call)
    for dims, meta in zip(rule.results, call.results, strict=True):
        shapes = (None if dims is None else shape_of(dims), None if meta is None else meta.shape)
        if shapes[0] != shapes[1]:
            raise InternalError(f"rule of {call.target} gives dims {dims} to a result {meta}")
    return rule


def register_rule(
    op: str | torch._ops.OpOverload,
    rule: str,
    *,
    reduction: str = "",
    linear: Sequence[Sequence[int]] = (),
    example: Sequence[Any] | None = None,
    check: bool = True,
    replace: bool = False,
) -> None:
    """Say how calls of an operator can be sharded, for the rest of the process and on every rank.

    op:        "mylib::op", "mylib::op.overload" or an overload.
    rule:      one word per dim of each tensor argument and result, "b i k, b k j -> b i j". A dim
               of a letter is sharded in all tensors that name it. "." is a dim that stays whole,
               "..." any number of dims that broadcast: "..., ... -> ...".
    reduction: letters that are summed over: a result without them is a pending sum.
    linear:    groups of operand numbers in which the call is jointly linear.
    example:   arguments of a small call to check the rule on at once; made from the letters where
               the operator needs nothing but tensors. Calls that a plan meets are checked as well.
    check:     False trusts the rule: a wrong one then makes wrong gradients.
    replace:   allows to put it in the place of a rule that is written or registered already.
    RuleError with a counterexample for a rule that the operator does not obey, OptionError for an
    unknown operator or a second rule.
    """
    target = resolve(op)
    if target in rules() and not replace:
        raise OptionError(
            f"{target} has a rule already, in the family {family_of(target)!r}: pass replace=True"
            " to use another one"
        )
    lettering = Lettering.parse(rule, reduction, linear)
    fits_schema(target, lettering)
    if check:
        check_on_example(target, lettering, example)
    REGISTERED.add(target, lettering, check, replace=replace)


def family_of(target: object) -> str:
    """Name of the family that has a row for an operator."""
    from autopar.sharding.rules import FAMILIES

    return next(name for name, family in FAMILIES.items() if target in family)


def _signature(tree: Any, slots: Iterator[Slot]) -> Any:
    """The same nest, hashable, with a slot in the place of each Ref."""
    if type(tree) is Ref:
        return next(slots)
    if isinstance(tree, (list, tuple)):
        return tuple([_signature(item, slots) for item in tree])
    if isinstance(tree, slice):
        return ("slice", tree.start, tree.stop, tree.step)
    return tree


class RuleTable:
    """Rules of one graph: the Call and Rule of every operator and the dims of every value.

    Built in one pass in execution order, memoised by signature. O(operators).
    known: rules by signature, taken and added to, for tables of similar graphs.
    fallbacks: operator name -> overload for those that are replicated for want of a rule.
    """

    def __init__(
        self,
        graph: Graph,
        input_dims: Mapping[str, Dims] | None = None,
        known: dict[Call, Rule] | None = None,
    ) -> None:
        self.dims: dict[Ref, Dims] = {}
        self.calls: dict[str, Call] = {}
        self.rules: dict[str, Rule] = {}
        self.fallbacks: dict[str, str] = {}
        memo = {} if known is None else known
        metas = graph.metas()
        exact = _exact_values(graph)
        for inp in graph.inputs:
            self.dims[inp.ref] = (input_dims or {}).get(inp.name) or raw_dims(inp.meta.shape)
        for op in graph.operators:
            call = make_call(op, self.dims, metas, exact)
            rule = memo.get(call)
            if rule is None:
                rule = memo[call] = rule_for(call)
            self.calls[op.name] = call
            self.rules[op.name] = rule
            if rule.origin is Origin.REPLICATED:
                self.fallbacks[op.name] = op.op_name
            for index, dims in enumerate(rule.results):
                if dims is not None:
                    self.dims[Ref(op.name, index)] = dims

    def unwritten(self) -> dict[str, str]:
        """Overload -> origin and text of its rules, for those that no family has."""
        notes: dict[str, set[str]] = {}
        for name, rule in self.rules.items():
            if rule.origin is not Origin.WRITTEN:
                target = str(self.calls[name].target)
                notes.setdefault(target, set()).add(f"{rule.origin}: {rule.note}")
        return {target: " | ".join(sorted(notes[target])) for target in sorted(notes)}


def make_call(
    op: Operator, dims: Mapping[Ref, Dims], metas: Mapping[Ref, TensorMeta], exact: set[Ref]
) -> Call:
    """The signature of one operator."""
    operands = op.operands
    slots = map(Slot, itertools.count())
    first: dict[Ref, int] = {}
    return Call(
        target=op.target,
        args=_signature(op.args, slots),
        kwargs=tuple([(name, _signature(value, slots)) for name, value in op.kwargs.items()]),
        operands=tuple([dims[ref] for ref in operands]),
        dtypes=tuple([metas[ref].dtype for ref in operands]),
        results=op.results,
        same=tuple([first.setdefault(ref, i) for i, ref in enumerate(operands)]),
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
        if exact.issuperset(op.operands):
            exact.update(op.refs)
    return exact
