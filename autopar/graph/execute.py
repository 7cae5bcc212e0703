"""Run a graph whole on real tensors: the reference that every other execution is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import BatchError, InternalError
from autopar.graph.program import Graph, InputKind, Operator, Ref, map_refs
from autopar.ops.random import seed_tensor

aten = torch.ops.aten


def run_graph(graph: Graph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The values of `graph.outputs`, in their order.

    inputs: one tensor per graph input, by its name; all on one device, where everything is
    computed. A value is freed after its last reader. O(operators).
    """
    missing = [i.name for i in graph.inputs if i.name not in inputs]
    if missing:
        raise InternalError(f"run_graph got no tensor for the inputs {missing[:5]}")
    device = next(iter(inputs.values())).device if inputs else torch.device("cpu")
    uses = Counter(ref for op in graph.operators for ref in op.operands)
    uses.update(out.ref for out in graph.outputs)
    values: dict[Ref, Tensor] = {i.ref: inputs[i.name].detach() for i in graph.inputs}
    with torch.no_grad():
        for op in graph.operators:
            results = run_operator(op, values, device)
            for ref in op.operands:
                uses[ref] -= 1
                if not uses[ref]:
                    values.pop(ref, None)
            values.update((ref, results[ref.index]) for ref in op.refs if uses[ref])
    return [values[out.ref] for out in graph.outputs]


def run_operator(op: Operator, values: Mapping[Ref, Tensor], device: torch.device) -> Sequence[Any]:
    """Results of one operator on real tensors, one entry per result."""
    args = map_refs(op.args, values.__getitem__)
    kwargs = dict(map_refs(dict(op.kwargs), values.__getitem__))
    if kwargs.get("device") is not None:
        kwargs["device"] = device
    # The strides of a real kernel may differ from the traced ones; a reshape copies only then.
    target = aten.reshape.default if op.target is aten.view.default else op.target
    results = target(*args, **kwargs)
    return results if isinstance(results, (tuple, list)) else (results,)


def graph_inputs(
    graph: Graph,
    model: nn.Module,
    batch: Any,
    *,
    seed: int = 0,
    microbatch: int = 0,
    num_microbatches: int = 1,
) -> dict[str, Tensor]:
    """The inputs of a graph from the real model that it was captured from, and one microbatch.

    seed: of this step. The gradient of the loss is 1 / num_microbatches. Everything is on the
    device of the model's first parameter.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    device = next(iter(state.values())).device if state else torch.device("cpu")
    leaves = iter(graph.batch_spec.tensors(batch))
    inputs: dict[str, Tensor] = {}
    for inp in graph.inputs:
        match inp.kind:
            case InputKind.PARAMETER | InputKind.BUFFER:
                tensor: Tensor = state[inp.target].detach().to(inp.meta.dtype)
            case InputKind.BATCH:
                tensor = next(leaves)
                if tuple(tensor.shape) != inp.meta.shape or tensor.dtype != inp.meta.dtype:
                    raise BatchError(
                        f"batch[{inp.target!r}] is {tensor.dtype} {tuple(tensor.shape)}, but the"
                        f" graph was captured with {inp.meta}. Pass such a batch, or capture again."
                    )
            case InputKind.CONSTANT:
                tensor = graph.constants[inp.name]
            case InputKind.TANGENT:
                tensor = torch.full(inp.meta.shape, 1.0 / num_microbatches, dtype=inp.meta.dtype)
            case InputKind.SEED:
                tensor = seed_tensor(seed, microbatch)
            case _:
                raise InternalError(f"{inp.kind} input {inp.name!r} belongs to a stage graph")
        inputs[inp.name] = tensor.to(device)
    return inputs
