"""`autopar.register_rule`: sharding rules that a user writes.

The rules live in one object, `REGISTERED`, the only state of this package that changes: adding is
behind a lock, and a rule stays as it is for the life of the process. A rule is checked by running
its operator: at once on an example, and on the signature of every call that a plan meets.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from autopar.errors import OptionError, RuleError, RuleWarning
from autopar.graph.program import TensorMeta
from autopar.layout import raw_dims
from autopar.sharding.isolate import LIMIT_S, Crashed, isolated
from autopar.sharding.lettering import DOTS, Lettering
from autopar.sharding.probe import NotRunnable, make_probe, run_call, unsound
from autopar.sharding.rule import Call, Origin, Rule, Slot


class RegisteredRules:
    """Operator overload -> (lettering, whether calls are checked)."""

    def __init__(self) -> None:
        self._rules: dict[object, tuple[Lettering, bool]] = {}
        self._lock = threading.Lock()

    def get(self, target: object) -> tuple[Lettering, bool] | None:
        return self._rules.get(target)

    def add(self, target: object, rule: Lettering, check: bool, *, replace: bool) -> None:
        """OptionError where there is one, unless it is replaced."""
        with self._lock:
            if target in self._rules and not replace:
                raise OptionError(
                    f"{target} has a registered rule already, {self._rules[target][0]}: pass"
                    " replace=True to put another one in its place"
                )
            self._rules[target] = (rule, check)

    def remove(self, target: object) -> None:
        with self._lock:
            self._rules.pop(target, None)


REGISTERED = RegisteredRules()


def resolve(op: str | torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The overload called "mylib::op" or "mylib::op.overload". OptionError where there is none."""
    if isinstance(op, torch._ops.OpOverload):
        return op
    namespace, _, rest = str(op).partition("::")
    name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), name, None) if rest else None
    if packet is None:
        raise OptionError(
            f'{op!r} is no operator: name one as "mylib::op", or "mylib::op.overload", after the'
            " module that defines it was imported"
        )
    found = getattr(packet, overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise OptionError(
            f"{op!r} is no overload: {namespace}::{name} has {', '.join(packet.overloads())}"
        )
    return found


def fits_schema(target: torch._ops.OpOverload, rule: Lettering) -> None:
    """RuleError where the rule names another number of operands or results than the schema has."""
    kinds = [str(argument.type) for argument in target._schema.arguments]
    needed = sum(kind == "Tensor" for kind in kinds)
    optional = sum(kind == "Optional[Tensor]" for kind in kinds)
    lists = any("List[" in kind and "Tensor" in kind for kind in kinds)
    given = len(rule.operands)
    if given < needed or (given > needed + optional and not lists):
        most = "any number" if lists else str(needed + optional)
        expected = str(needed) if most == str(needed) else f"{needed} to {most}"
        raise RuleError(
            f"the rule {rule} names {given} operands, {target._schema} has {expected} tensors: one"
            " group of words per tensor argument, in the order of the schema"
        )
    returns = target._schema.returns
    if len(rule.results) != len(returns) and not any("List[" in str(r.type) for r in returns):
        raise RuleError(
            f"the rule {rule} names {len(rule.results)} results, {target._schema} has"
            f" {len(returns)}"
        )


def check_on_example(
    target: torch._ops.OpOverload, rule: Lettering, example: Sequence[Any] | None
) -> None:
    """RuleError with a counterexample, or where a given example is no call of the operator. Without
    an example one is made of the letters, where that is a call."""
    given = example is not None
    example = _made_example(target, rule) if example is None else example
    if example is None:
        return
    try:
        call = _example_call(target, example)
    except Exception as error:  # whatever the operator raises
        if given:
            raise RuleError(f"{target} fails on the example: {error}") from error
        return
    rule.rule(call)
    problem = _unsound(call, rule)
    if problem:
        raise RuleError(f"{target} does not obey the rule {rule}: {problem}")


def _example_call(target: torch._ops.OpOverload, example: Sequence[Any]) -> Call:
    operands: list[Tensor] = []

    def slotted(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            operands.append(tree.detach().cpu())
            return Slot(len(operands) - 1)
        if isinstance(tree, (tuple, list)):
            return tuple(slotted(item) for item in tree)
        return tree

    args = tuple(slotted(item) for item in example)
    call = Call(
        target=target,
        args=args,
        kwargs=(),
        operands=tuple(raw_dims(tuple(t.shape)) for t in operands),
        dtypes=tuple(t.dtype for t in operands),
        results=(),
        same=tuple(range(len(operands))),
    )
    results = run_call(call, operands)
    metas = tuple(None if r is None else TensorMeta(tuple(r.shape), r.dtype) for r in results)
    return replace(call, results=metas)


def _made_example(target: torch._ops.OpOverload, rule: Lettering) -> tuple[Any, ...] | None:
    """A call with float tensors whose sizes follow the letters; None where other arguments are
    needed."""
    sizes = {letter: 6 * (i + 1) for i, letter in enumerate(rule.letters)}
    words = iter(rule.operands)
    example: list[Any] = []
    for argument in target._schema.arguments:
        if argument.kwarg_only:
            break
        if str(argument.type) in ("Tensor", "Optional[Tensor]"):
            named = next(words, None)
            if named is not None:
                shape = [n for w in named for n in ([6, 12] if w == DOTS else [sizes.get(w, 6)])]
                example.append(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
                continue
        if not argument.has_default_value():
            return None
        example.append(argument.default_value)
    return None if next(words, None) is not None else tuple(example)


def registered_rule(call: Call) -> Rule | None:
    """The registered rule of a call, checked; RuleError with a counterexample where the operator
    does not obey it."""
    found = REGISTERED.get(call.target)
    if found is None:
        return None
    lettering, check = found
    rule = replace(lettering.rule(call), origin=Origin.REGISTERED, note=str(lettering))
    problem = _unsound(call, lettering) if check else ""
    if problem:
        raise RuleError(
            f"{call.target} does not obey its registered rule {lettering}: {problem}. Correct the"
            " rule, or, if this is rounding, pass check=False"
        )
    return rule


@lru_cache(maxsize=1024)
def _unsound(call: Call, lettering: Lettering) -> str:
    """A counterexample; "" where there is none. A RuleWarning, once, where the operator cannot be
    examined: the rule is then believed."""

    def examine() -> str:
        return unsound(make_probe(call), lettering)

    try:
        return isolated(examine, LIMIT_S)
    except (NotRunnable, Crashed) as error:
        warnings.warn(
            f"the rule {lettering} of {call.target} cannot be checked, as {error}, and is believed",
            RuleWarning,
            stacklevel=2,
        )
        return ""
