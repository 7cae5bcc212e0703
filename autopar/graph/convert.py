"""torch.fx to the typed graph: names, metas, phases, provenance and partners. No rewriting here.

The joint graph comes with a descriptor on each placeholder and each output, which says what it is.
A backward node's partner is the *first* forward node with its sequence number: autograd counts up
when it records a node, so nodes that it does not record share the number of the one before them.
Sums of gradients have a stale number and keep none.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd import descriptors as aot
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.graph.batch import BatchSpec
from autopar.graph.numbering import Names, input_name
from autopar.graph.program import (
    Graph,
    GraphInput,
    GraphOutput,
    InputKind,
    Operator,
    OutputKind,
    Phase,
    Ref,
    TensorMeta,
)
from autopar.graph.provenance import MODULE_KEY, SOURCE_KEY

aten = torch.ops.aten
_STRIDED = {aten.as_strided.default: 1, aten.as_strided_scatter.default: 2}  # position of sizes


@dataclass(frozen=True, slots=True)
class Naming:
    """What the placeholders of the traced module are called outside.

    prefix: what the traced module puts before the model's own names.
    owners: canonical name of each parameter and buffer name (tied ones share it).
    trainable: the names of the parameters that require a gradient.
    """

    prefix: str
    owners: Mapping[str, str]
    trainable: frozenset[str]
    batch: BatchSpec


def convert(module: fx.GraphModule, naming: Naming) -> Graph:
    """The typed graph of a joint module made by AOTAutograd. O(nodes)."""
    nodes = list(module.graph.nodes)
    values: dict[fx.Node, Ref | tuple[str]] = {}
    inputs = _inputs(nodes, naming, values)
    constants = _constants(module, nodes, values)
    inputs += [
        GraphInput(name, InputKind.CONSTANT, _meta(data), target=name)
        for name, data in constants.items()
    ]
    partners = _partners(nodes)
    operators = []
    for node in nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            source, index = node.args
            values[node] = Ref(values[source][0], index)
            continue
        operators.append(_operator(node, partners, values))
        values[node] = Ref(node.name)
    outputs = _outputs(nodes[-1], inputs, values, naming)
    return Graph(tuple(inputs), tuple(operators), outputs, constants, naming.batch)


def _inputs(
    nodes: Iterable[fx.Node], naming: Naming, values: dict[fx.Node, Any]
) -> list[GraphInput]:
    names = Names()
    inputs = []
    for node in nodes:
        if node.op != "placeholder":
            continue
        kind, target, owner = _input_identity(node.meta["desc"], naming)
        name = input_name(names, kind, target)
        value = node.meta["val"]
        grad = kind is InputKind.PARAMETER and target in naming.trainable
        inputs.append(GraphInput(name, kind, _meta(value), target, owner, grad))
        values[node] = Ref(name)
    return inputs


def _input_identity(desc: Any, naming: Naming) -> tuple[InputKind, str, str]:
    """Kind, target and owner of a placeholder."""
    match desc:
        case aot.ParamAOTInput(target=target):
            target = target.removeprefix(naming.prefix)
            return InputKind.PARAMETER, target, naming.owners[target]
        case aot.BufferAOTInput(target=target):
            target = target.removeprefix(naming.prefix)
            return InputKind.BUFFER, target, naming.owners[target]
        case aot.PlainAOTInput(idx=index):
            return InputKind.BATCH, naming.batch.tensor_paths[index], ""
        case aot.TangentAOTInput():
            return InputKind.TANGENT, "", ""
    raise CaptureError(
        f"capture met an input of a kind it does not know: {desc}. Tensor subclasses and effect"
        " tokens are not supported; pass plain parameters and tensors."
    )


def _constants(
    module: fx.GraphModule, nodes: Iterable[fx.Node], values: dict[fx.Node, Any]
) -> dict[str, Tensor]:
    """Tensors found in the model's code, once each."""
    constants: dict[str, Tensor] = {}
    for node in nodes:
        if node.op != "get_attr":
            continue
        data = getattr(module, str(node.target))
        name = f"constant_{_identifier(str(node.target))}"
        if isinstance(data, torch.Generator):
            raise CaptureError(
                "the model draws random numbers from a torch.Generator of its own. Leave the"
                " generator out: all numbers follow from the seed of `train_step`."
            )
        if not isinstance(data, Tensor):
            raise CaptureError(f"the model calls a control-flow operator through {node.target!r}")
        constants[name] = data.detach()
        values[node] = Ref(name)
    return constants


def _partners(nodes: Iterable[fx.Node]) -> dict[int, fx.Node]:
    """First forward node by sequence number."""
    partners: dict[int, fx.Node] = {}
    for node in nodes:
        is_call = node.op == "call_function" and node.target is not operator.getitem
        if is_call and "seq_nr" in node.meta and not _is_backward(node):
            partners.setdefault(node.meta["seq_nr"], node)
    return partners


def _is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def _operator(
    node: fx.Node, partners: Mapping[int, fx.Node], values: Mapping[fx.Node, Any]
) -> Operator:
    if not isinstance(node.target, torch._ops.OpOverload):
        raise CaptureError(
            f"the model calls {node.target} at {node.meta.get(SOURCE_KEY) or 'an unknown line'},"
            " which is not a plain tensor operator. Control-flow and flex-attention operators are"
            " not supported: write the computation with ordinary operators."
        )
    target, plain_args = _as_view(node) or (node.target, node.args)
    args = fx.node.map_arg(plain_args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    backward = _is_backward(node)
    partner = None
    if backward and not node.meta.get("is_gradient_acc", False):
        partner = partners.get(node.meta.get("seq_nr", -1))
    origin = node if partner is None else partner
    return Operator(
        name=node.name,
        target=target,
        args=tuple(_plain(args)),
        kwargs=dict(_plain(kwargs)),
        results=_results(node.meta.get("val")),
        phase=Phase.BACKWARD if backward else Phase.FORWARD,
        module="" if backward and partner is None else _module_path(origin),
        source=node.meta.get(SOURCE_KEY) or origin.meta.get(SOURCE_KEY, ""),
        forward="" if partner is None else partner.name,
    )


def _as_view(node: fx.Node) -> tuple[torch._ops.OpOverload, tuple[Any, ...]] | None:
    """Strides say where elements lie in memory, which shards do not keep. A strided view of a whole
    contiguous tensor in its own order is `view`, and writing through one gives what was written."""
    if node.target not in _STRIDED:
        return None
    args: tuple[Any, ...] = node.args
    base, (size, strides, *offset) = args[0].meta["val"], args[_STRIDED[node.target] :]
    whole = _is_contiguous(base.shape, base.stride()) and _is_contiguous(size, strides)
    if not whole or math.prod(size) != base.numel() or offset not in ([], [0]):
        return None
    if len(node.all_input_nodes) == 1:
        return aten.view.default, (args[0], list(size))
    return aten.view.default, (args[1], list(base.shape))


def _is_contiguous(size: Sequence[int], strides: Sequence[int]) -> bool:
    wanted = list(itertools.accumulate(reversed(size), operator.mul, initial=1))[-2::-1]
    return all(n == 1 or s == w for n, s, w in zip(size, strides, wanted, strict=True))


def _plain(tree: Any) -> Any:
    """torch.fx's immutable lists and dicts as ordinary ones; Refs stay."""
    if isinstance(tree, Ref):
        return tree
    if isinstance(tree, tuple):
        return tuple(_plain(item) for item in tree)
    if isinstance(tree, list):
        return [_plain(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return tree


def _module_path(node: fx.Node) -> str:
    return str(next(iter(node.meta.get(MODULE_KEY) or {"": None})))


def _results(value: Any) -> tuple[TensorMeta | None, ...]:
    if value is None:
        return ()
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_meta(item) if isinstance(item, Tensor) else None for item in items)


def _meta(value: Tensor) -> TensorMeta:
    return TensorMeta(tuple(int(size) for size in value.shape), value.dtype)


def _outputs(
    node: fx.Node, inputs: list[GraphInput], values: Mapping[fx.Node, Any], naming: Naming
) -> tuple[GraphOutput, ...]:
    leaves = pytree.tree_leaves(node.args)
    by_identity = {(i.kind, i.target): i.name for i in inputs}
    outputs = []
    for leaf, desc in zip(leaves, pytree.tree_leaves(node.meta["desc"]), strict=True):
        if not isinstance(leaf, fx.Node):
            continue  # the gradient of a parameter that the loss does not depend on
        match desc:
            case aot.PlainAOTOutput():
                outputs.append(GraphOutput(OutputKind.LOSS, values[leaf]))
            case aot.GradAOTOutput(grad_of=source):
                target = by_identity[_input_identity(source, naming)[:2]]
                outputs.append(GraphOutput(OutputKind.GRADIENT, values[leaf], target))
            case aot.InputMutationAOTOutput(mutated_input=source):
                kind, name, _ = _input_identity(source, naming)
                if kind is not InputKind.BUFFER:
                    raise CaptureError(
                        f"the model writes into its {kind.value} {name!r} in place. Only buffers"
                        " may be updated during forward: clone it first, or make it a buffer."
                    )
                target = by_identity[kind, name]
                outputs.append(GraphOutput(OutputKind.BUFFER, values[leaf], target))
            case _:
                raise CaptureError(f"capture met an output of a kind it does not know: {desc}")
    return tuple(outputs)


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)
