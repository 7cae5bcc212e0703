"""The typed graph: one joint forward and backward dataflow program, as frozen data.

A :class:`Graph` is what capture makes and what every later pass reads: operators in execution
order, each with its overload, arguments, result shapes, phase, module path and source line. Values
are named by :class:`Ref`; an argument tree holds ``Ref`` where torch.fx would hold a node. Passes
are functions from one graph to the next; :func:`check_graph` is the verifier that runs after each
of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from autopar.errors import InternalError


class Phase(StrEnum):
    """When an operator runs within one microbatch."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Ref(NamedTuple):
    """A value: result ``index`` of the operator or input called ``name``."""

    name: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which nobody needs

    def __str__(self) -> str:
        return self.name if self.index == 0 else f"{self.name}.{self.index}"


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape and dtype of a value on one device (never its data)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int = field(init=False, repr=False, compare=False)
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", math.prod(self.shape))
        object.__setattr__(self, "nbytes", self.numel * self.dtype.itemsize)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class InputKind(StrEnum):
    """What a graph input stands for."""

    PARAMETER = (
        "parameter"  # target: name as the module path spells it; owner: canonical name if tied
    )
    BUFFER = "buffer"
    BATCH = "batch"  # target: path of the leaf in the batch, e.g. "input_ids" or "0"
    CONSTANT = "constant"  # a tensor found by capture; its data is in Graph.constants
    TANGENT = "tangent"  # gradient of the loss: 1 / number of microbatches
    SEED = "seed"  # int32[2]: hash of the step's seed, number of the microbatch
    RECEIVED = "received"  # made by another stage (only in stage graphs)


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One input of the graph.

    owner: for a parameter or buffer the canonical name; tied uses share it while their targets
    differ. phase: when the value exists; BACKWARD only for a gradient RECEIVED from another stage.
    rest, reduce: of a parameter under a Precision: dtype of the value that is kept and updated,
    where it is not `meta.dtype`; dtype in which its gradient is reduced.
    """

    name: str
    kind: InputKind
    meta: TensorMeta
    target: str
    owner: str = ""
    requires_grad: bool = False
    phase: Phase = Phase.FORWARD
    rest: torch.dtype | None = None
    reduce: torch.dtype | None = None

    @property
    def ref(self) -> Ref:
        return Ref(self.name)

    @property
    def rest_meta(self) -> TensorMeta:
        """Of the value between steps."""
        return self.meta if self.rest is None else TensorMeta(self.meta.shape, self.rest)


class OutputKind(StrEnum):
    """What a graph output stands for."""

    LOSS = "loss"
    GRADIENT = "gradient"  # of the parameter input `target`
    BUFFER = "buffer"  # new value of the buffer input `target`
    SENT = "sent"  # read by another stage (only in stage graphs)


@dataclass(frozen=True, slots=True)
class GraphOutput:
    """One output of the graph. target: name of the graph *input* it belongs to; for SENT
    the name of the value; "" for the loss."""

    kind: OutputKind
    ref: Ref
    target: str = ""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator call.

    results: one meta per result; None for a result that nobody has (a masked gradient, say).
    module:  path of the module instance in which it was called; a second call reads "layers.3@1".
    source:  "file.py:line" of the user's code, or "".
    forward: for a backward operator, the name of its forward partner, else "".
    layer:   index of its layer, -1 before `graph.layers` has run.
    recompute: a copy made by the save/recompute pass; it runs in the backward phase.
    inlined: such a copy that compiled code makes in its readers (`graph.inline`), for nothing.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[TensorMeta | None, ...]
    phase: Phase
    module: str = ""
    source: str = ""
    forward: str = ""
    layer: int = -1
    recompute: bool = False
    inlined: bool = False
    operands: tuple[Ref, ...] = field(init=False, repr=False, compare=False)
    refs: tuple[Ref, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """operands: every value read, in argument order, repeated where it is passed twice. refs:
        the results that exist."""
        operands = refs_in(self.args)
        if self.kwargs:
            operands += refs_in(self.kwargs)
        object.__setattr__(self, "operands", tuple(operands))
        made = [Ref(self.name, i) for i, meta in enumerate(self.results) if meta is not None]
        object.__setattr__(self, "refs", tuple(made))

    def changed(self, **changes: Any) -> Operator:
        """As `dataclasses.replace`, in a fifth of its time: a search makes 100,000 operators."""
        op = object.__new__(Operator)
        for name in _FIELDS:
            object.__setattr__(op, name, getattr(self, name))
        for name, value in changes.items():
            object.__setattr__(op, name, value)
        if not _DECIDING.isdisjoint(changes):
            op.__post_init__()
        return op

    def reading(self, new: Callable[[Ref], Any], **changes: Any) -> Operator:
        """The operator on other values: new(ref) in place of each ref, asked in argument order."""
        args = map_refs(self.args, new)
        kwargs = map_refs(self.kwargs, new) if self.kwargs else self.kwargs
        if not changes and args == self.args and kwargs == self.kwargs:
            return self
        return self.changed(args=args, kwargs=kwargs, **changes)

    @property
    def op_name(self) -> str:
        """Name of the overload, such as "aten.mm.default"."""
        return str(self.target)

    def __str__(self) -> str:
        metas = ", ".join("-" if m is None else str(m) for m in self.results)
        reads = ", ".join(map(str, self.operands))
        return f"{self.name}: {metas} = {self.op_name}({reads})"


_FIELDS = tuple(f.name for f in fields(Operator))
_DECIDING = frozenset({"name", "args", "kwargs", "results"})  # of operands and refs


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A joint graph at the shape of one microbatch. Operators are in execution order.

    batch_spec: torch.utils._pytree TreeSpec of the batch, whose leaves are the BATCH inputs in
    order. layer_names: one human-readable name per layer once `graph.layers` has run. weights:
    bytes of values where they count otherwise than they are: a float64 twin saves for backward what
    the graph itself does.
    """

    inputs: tuple[GraphInput, ...]
    operators: tuple[Operator, ...]
    outputs: tuple[GraphOutput, ...]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    batch_spec: Any = None
    layer_names: tuple[str, ...] = ()
    weights: Mapping[Ref, int] = field(default_factory=dict)
    _metas: Mapping[Ref, TensorMeta] | None = field(default=None, init=False, repr=False)

    def inputs_of(self, kind: InputKind) -> tuple[GraphInput, ...]:
        return tuple(i for i in self.inputs if i.kind is kind)

    def outputs_of(self, kind: OutputKind) -> tuple[GraphOutput, ...]:
        return tuple(o for o in self.outputs if o.kind is kind)

    def metas(self) -> Mapping[Ref, TensorMeta]:
        """Meta of every value, collected once. O(values)."""
        if self._metas is None:
            metas = {i.ref: i.meta for i in self.inputs}
            for op in self.operators:
                metas.update(zip(op.refs, filter(None, op.results), strict=True))
            object.__setattr__(self, "_metas", metas)
            return metas
        return self._metas

    def readers(self) -> dict[Ref, list[Operator]]:
        """Operators that read each value, in execution order, each once. O(edges)."""
        readers: dict[Ref, list[Operator]] = {}
        for op in self.operators:
            for ref in dict.fromkeys(op.operands):
                readers.setdefault(ref, []).append(op)
        return readers

    def with_operators(self, operators: tuple[Operator, ...]) -> Graph:
        return replace(self, operators=operators)

    def fingerprint(self) -> str:
        """Hash of everything that a plan depends on: operators, shapes, constants' shapes,
        names."""
        digest = hashlib.sha256()
        for inp in self.inputs:
            digest.update(f"{inp.kind} {inp.target} {inp.owner} {inp.meta}".encode())
            digest.update(f" {inp.rest} {inp.reduce}\n".encode() if inp.rest else b"\n")
        for op in self.operators:
            digest.update(f"{op} {op.args} {sorted(op.kwargs.items())} {op.phase}\n".encode())
        for out in self.outputs:
            digest.update(f"{out.kind} {out.ref} {out.target}\n".encode())
        return digest.hexdigest()[:16]


# Most leaves of argument trees; asking them whether they are mappings takes longest.
_LEAVES = frozenset({int, bool, float, str, type(None), torch.dtype, torch.device})


def refs_in(tree: Any) -> list[Ref]:
    """Every Ref in a nest of tuples, lists and dicts, in order."""
    if type(tree) is Ref:
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    found: list[Ref] = []
    for item in tree:
        if type(item) is Ref:
            found.append(item)
        elif type(item) not in _LEAVES:
            found += refs_in(item)
    return found


def map_refs(tree: Any, fn: Callable[[Ref], Any]) -> Any:
    """The same nest with every Ref replaced by fn(ref). Tuples and lists keep their type."""
    if type(tree) is Ref:
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        items = [i if type(i) in _LEAVES else map_refs(i, fn) for i in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, Mapping):
        return {key: map_refs(item, fn) for key, item in tree.items()}
    return tree


def check_graph(graph: Graph) -> Graph:
    """Verifier: names are unique, every value is made before it is read, outputs exist, and no
    forward operator reads a backward value. Returns the graph. O(edges)."""
    phases: dict[Ref, Phase] = {}
    names: set[str] = set()
    for inp in graph.inputs:
        if inp.name in names:
            raise InternalError(f"two inputs are called {inp.name!r}")
        names.add(inp.name)
        phases[inp.ref] = inp.phase
    for op in graph.operators:
        if op.name in names:
            raise InternalError(f"two values are called {op.name!r}")
        names.add(op.name)
        for ref in op.operands:
            if ref not in phases:
                raise InternalError(f"{op} reads {ref}, which nothing before it makes")
            if op.phase is Phase.FORWARD and phases[ref] is Phase.BACKWARD:
                raise InternalError(f"forward operator {op} reads {ref}, a backward value")
        phases.update(dict.fromkeys(op.refs, op.phase))
    for out in graph.outputs:
        if out.ref not in phases:
            raise InternalError(
                f"{out.kind} output {out.target!r} is {out.ref}, which nothing makes"
            )
    return graph
