"""In which floating-point types a step computes, keeps its parameters and reduces its gradients.

A mixed `Precision` makes the captured graph compute in a narrow type, while the parameters that the
optimizer sees stay in float32 (Micikevicius et al., "Mixed Precision Training", ICLR 2018):

    parameter at rest, float32  ->  cast, then gathered  ->  forward, backward in bfloat16
    gradient, bfloat16  ->  cast to float32, accumulated over microbatches  ->  reduced  ->  at rest

`in_float64` is for verification: a float64 graph computes what a narrow one means without its
rounding, so that two programs that agree to 1e-10 in it are the same program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autopar.errors import OptionError
from autopar.graph.program import (
    Graph,
    GraphInput,
    InputKind,
    Operator,
    OutputKind,
    Ref,
    TensorMeta,
    check_graph,
)
from autopar.graph.rewrite import derived

aten = torch.ops.aten

_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_AS_BUILT = "model"


@dataclass(frozen=True, slots=True)
class Precision:
    """compute: type of parameters and activations inside a step; None leaves the model as it was
    built. reduce: type in which gradients cross the network.

    Under a compute type, trainable parameters are float32 between steps, gradients accumulate in
    float32, floating inputs of the model are cast on entry (the loss function gets the batch as it
    is), and buffers and BatchNorm modules, whose statistics need it, stay as they are.
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        known = _NAMES.values()
        if self.compute not in (None, *known) or self.reduce not in known:
            raise OptionError(
                "a precision computes in float32 or bfloat16 and reduces gradients in float32 or"
                f" bfloat16: got compute={self.compute}, reduce={self.reduce}. float16 would need"
                " loss scaling: use bfloat16"
            )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """ "model", "fp32", "bf16" or "bf16/bf16": compute, and after a slash the type of the
        gradient reduction (float32 without one)."""
        if text == _AS_BUILT:
            return cls()
        compute, _, reduce = text.partition("/")
        if compute not in _NAMES or (reduce or "fp32") not in _NAMES:
            raise OptionError(
                f"a precision reads model, fp32, bf16 (gradients reduced in fp32) or bf16/bf16"
                f" (gradients reduced in bf16): got {text!r}"
            )
        return cls(_NAMES[compute], _NAMES[reduce or "fp32"])

    def __str__(self) -> str:
        if self.compute is None:
            return _AS_BUILT
        name = {dtype: text for text, dtype in _NAMES.items()}
        return f"{name[self.compute]}/{name[self.reduce]}"


def kept_as_built(model: nn.Module) -> frozenset[int]:
    """ids of the parameters that no precision touches: those beside running statistics."""
    return frozenset(
        id(parameter)
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None
        for parameter in module.parameters(recurse=False)
    )


def with_master_parameters(
    graph: Graph, built: Mapping[str, torch.dtype], precision: Precision
) -> Graph:
    """Float32 parameters around a graph that was captured in `precision.compute`.

    built: the model's own type of each parameter, by canonical name: a frozen one keeps it.
    Trainable ones narrower than float32 are float32 at rest, and their gradients are cast to it.
    """
    if precision.compute is None:
        return graph

    def master(inp: GraphInput) -> GraphInput:
        if inp.kind is not InputKind.PARAMETER or not inp.meta.dtype.is_floating_point:
            return inp
        rest = built[inp.owner]
        if inp.requires_grad:
            rest = torch.promote_types(inp.meta.dtype, torch.float32)
        if rest == inp.meta.dtype:
            return inp
        return replace(inp, rest=rest, reduce=precision.reduce)

    inputs = tuple(map(master, graph.inputs))
    widened = {i.name: i.rest for i in inputs if i.rest is not None}
    casts: dict[Ref, Operator] = {}
    makers = {ref: op for op in graph.operators for ref in op.refs}
    outputs = []
    for out in graph.outputs:
        rest = widened.get(out.target) if out.kind is OutputKind.GRADIENT else None
        if rest is not None:
            if out.ref not in casts:
                casts[out.ref] = _cast(makers[out.ref], out.ref, rest)
            out = replace(out, ref=Ref(casts[out.ref].name))
        outputs.append(out)
    operators: list[Operator] = []
    for op in graph.operators:
        operators += [op, *(casts[ref] for ref in op.refs if ref in casts)]
    return check_graph(
        replace(graph, inputs=inputs, operators=tuple(operators), outputs=tuple(outputs))
    )


def _cast(maker: Operator, ref: Ref, dtype: torch.dtype) -> Operator:
    meta = maker.results[ref.index]
    assert meta is not None
    name = f"master_{maker.name}_{ref.index}"
    cast = derived(maker, name, aten._to_copy.default, (ref,), TensorMeta(meta.shape, dtype))
    return replace(cast, kwargs={"dtype": dtype})


def reduced_after(graph: Graph) -> frozenset[str]:
    """Names of the gradient casts whose operand must not be reduced: sums that are pending there
    are done behind the cast, in the wide type."""
    wide = {i.name for i in graph.inputs if i.rest is not None and i.reduce == i.rest}
    return frozenset(
        out.ref.name for out in graph.outputs_of(OutputKind.GRADIENT) if out.target in wide
    )


def in_float64(graph: Graph) -> Graph:
    """Every float32 (also bfloat16 and float16) value, cast and constant as float64, complex ones
    likewise."""

    def meta(old: TensorMeta | None) -> TensorMeta | None:
        return None if old is None else TensorMeta(old.shape, widened(old.dtype))

    operators = tuple(
        replace(
            op,
            args=_map_dtypes(op.args),
            kwargs=_map_dtypes(dict(op.kwargs)),
            results=tuple(meta(m) for m in op.results),
        )
        for op in graph.operators
    )
    inputs = tuple(
        replace(
            i,
            meta=meta(i.meta) or i.meta,
            rest=None if i.rest is None else widened(i.rest),
            reduce=None if i.reduce is None else widened(i.reduce),
        )
        for i in graph.inputs
    )
    constants = {k: v.to(widened(v.dtype)) for k, v in graph.constants.items()}
    weights = {ref: meta.nbytes for ref, meta in graph.metas().items()} | dict(graph.weights)
    twin = replace(graph, inputs=inputs, operators=operators, constants=constants, weights=weights)
    return check_graph(twin)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type of the same kind with 64-bit reals."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _map_dtypes(tree: Any) -> Any:
    if isinstance(tree, torch.dtype):
        return widened(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map_dtypes(item) for item in tree)
    if isinstance(tree, Mapping):
        return {key: _map_dtypes(item) for key, item in tree.items()}
    return tree
