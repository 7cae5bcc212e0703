"""Names and numbers that follow from the structure of a graph alone.

torch.fx counts nodes that later passes remove, so its names tell how a graph was made. Here
operators of one name are counted in execution order ("mm", "mm_1"), and so are random ones; an
input is called after what it stands for, and constants are in the order in which they are first
read. Two ways to the same graph then agree in every name, and in every random number.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

import autopar.ops  # noqa: F401  registers the random operators
from autopar.graph.program import Graph, GraphInput, InputKind, Operator, Ref

_OWN = torch.ops.autopar
# Position of op_id among the arguments of each operator that hashes one.
OP_ID: Mapping[object, int] = {
    _OWN.dropout.default: 2,
    _OWN.sdpa_dropout.default: 6,
    _OWN.sdpa_dropout_backward.default: 9,
    _OWN.uniform.default: 1,
    _OWN.normal.default: 1,
    _OWN.randint.default: 1,
}
_NUMBER = re.compile(r"_\d+(?=_|$)")
_BUILTINS = frozenset(dir(builtins))  # "pow", "sum": such an operator counts from 1


class Names:
    """Hands out names; the second "mm" is "mm_1"."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._counts: dict[str, int] = {}

    def fresh(self, base: str) -> str:
        count = self._counts.get(base, 0)
        name = base if count == 0 else f"{base}_{count}"
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._counts[base] = count
        self._taken.add(name)
        return name


def input_name(names: Names, kind: InputKind, target: str) -> str:
    """Such as "parameter_h_0_weight", "batch_input_ids", "tangent"."""
    return names.fresh(re.sub(r"\W", "_", f"{kind.value}_{target}" if target else kind.value))


def renumbered(graph: Graph) -> Graph:
    """The same graph with the names and numbers of the module docstring. O(edges)."""
    inputs = _in_reading_order(graph)
    names = Names()
    new = {old.name: input_name(names, i.kind, i.target) for old, i in inputs}
    operator_names = Names(_BUILTINS.union(new.values()))
    new.update((op.name, operator_names.fresh(_base(op.name))) for op in graph.operators)
    new[""] = ""  # no partner, no target
    ids: dict[Any, int] = {}

    def rename(ref: Ref) -> Ref:
        return Ref(new[ref.name], ref.index)

    operators = []
    for op in graph.operators:
        op = with_op_id(op, lambda number: ids.setdefault(number, len(ids)))
        operators.append(op.reading(rename, name=new[op.name], forward=new[op.forward]))
    return replace(
        graph,
        inputs=tuple(replace(i, name=new[old.name]) for old, i in inputs),
        operators=tuple(operators),
        outputs=tuple(
            replace(out, ref=rename(out.ref), target=new[out.target]) for out in graph.outputs
        ),
        constants={
            new[old.name]: graph.constants[old.name]
            for old, _ in inputs
            if old.kind is InputKind.CONSTANT
        },
        weights={rename(ref): size for ref, size in graph.weights.items()},
    )


def _in_reading_order(graph: Graph) -> list[tuple[GraphInput, GraphInput]]:
    """Every input and what it becomes: constants, which have no name of their own, are numbered as
    they are first read."""
    constants = {i.name: i for i in graph.inputs_of(InputKind.CONSTANT)}
    read = (ref.name for op in graph.operators for ref in op.operands) if constants else ()
    order = [name for name in dict.fromkeys(read) if name in constants]
    order += [name for name in constants if name not in order]
    ordered = iter((constants[name], number) for number, name in enumerate(order))
    pairs = []
    for inp in graph.inputs:
        if inp.kind is InputKind.CONSTANT:
            inp, number = next(ordered)
            pairs.append((inp, replace(inp, target=str(number))))
        else:
            pairs.append((inp, inp))
    return pairs


def _base(name: str) -> str:
    """ "addmm_bias" of "addmm_2_bias", and of its copy "addmm_2_bias@3" (`graph.repeat`)."""
    return _NUMBER.sub("", name.partition("@")[0])


def with_op_id(op: Operator, new: Callable[[Any], Any]) -> Operator:
    """A random operator that hashes new(its number); any other as it is."""
    position = OP_ID.get(op.target)
    if position is None:
        return op
    number = new(op.args[position])
    return op.changed(args=(*op.args[:position], number, *op.args[position + 1 :]))


def without_op_id(op: Operator) -> tuple[Any, ...]:
    """The arguments, less the number of a random operator."""
    position = OP_ID.get(op.target)
    return op.args if position is None else (*op.args[:position], *op.args[position + 1 :])
