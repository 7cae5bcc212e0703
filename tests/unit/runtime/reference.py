"""What a step means: the captured graph run whole on every microbatch, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.graph.capture import capture_graph
from autopar.graph.execute import run_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.precision import Precision, in_float64
from autopar.graph.program import Graph, InputKind, OutputKind
from autopar.ops.random import seed_tensor
from tests.uneven import UNEVEN
from tests.zoo import ZOO


@dataclass(frozen=True)
class Case:
    """A model: its graph at the shape of a microbatch, state and batch in one
    precision."""

    graph: Graph
    model: nn.Module
    batch: Any
    parameters: Mapping[str, Tensor]  # by owner
    buffers: Mapping[str, Tensor]  # by path

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.graph.batch_spec.tensors(self.batch)


@dataclass(frozen=True)
class Expected:
    loss: Tensor
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


def zoo_case(
    name: str,
    *,
    num_microbatches: int = 2,
    double: bool = True,
    precision: Precision = Precision(),
) -> Case:
    model, batch = {**ZOO, **UNEVEN}[name]()
    part = pytree.tree_map(
        lambda t: t[: len(t) // num_microbatches] if isinstance(t, Tensor) else t, batch
    )
    graph = cluster_layers(capture_graph(model, part, precision=precision))
    if double:
        graph = in_float64(graph)
        model = model.double()
        batch = pytree.tree_map(
            lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch
        )
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers(remove_duplicate=False)}
    return Case(graph, model, batch, parameters, buffers)


def expected_step(
    case: Case,
    *,
    seed: int,
    num_microbatches: int = 2,
    parameters: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Expected:
    """Loss: mean over microbatches. Gradients: sum, by owner. Buffers: after the last
    microbatch."""
    graph = case.graph
    held = dict(buffers or case.buffers)
    weights = parameters or case.parameters
    gradients: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    owners = {i.name: i.owner for i in graph.inputs_of(InputKind.PARAMETER)}
    paths = {i.name: i.target for i in graph.inputs_of(InputKind.BUFFER)}
    for m in range(num_microbatches):
        leaves = iter(leaf.chunk(num_microbatches)[m] for leaf in case.leaves)
        values: dict[str, Tensor] = {}
        for inp in graph.inputs:
            if inp.kind is InputKind.PARAMETER:
                values[inp.name] = weights[inp.owner]
            elif inp.kind is InputKind.BUFFER:
                values[inp.name] = held[inp.target]
            elif inp.kind is InputKind.BATCH:
                values[inp.name] = next(leaves)
            elif inp.kind is InputKind.CONSTANT:
                values[inp.name] = graph.constants[inp.name]
            elif inp.kind is InputKind.TANGENT:
                tangent = 1.0 / num_microbatches
                values[inp.name] = torch.full(inp.meta.shape, tangent, dtype=inp.meta.dtype)
            else:
                assert inp.kind is InputKind.SEED
                values[inp.name] = seed_tensor(seed, m)
        for out, value in zip(graph.outputs, run_graph(graph, values), strict=True):
            if out.kind is OutputKind.LOSS:
                losses.append(value)
            elif out.kind is OutputKind.GRADIENT:
                owner = owners[out.target]
                gradients[owner] = gradients[owner] + value if owner in gradients else value.clone()
            elif out.kind is OutputKind.BUFFER:
                held[paths[out.target]] = value
    return Expected(torch.stack(losses).mean(), gradients, held)


def scale_of(tensors: Sequence[Tensor]) -> float:
    """Root mean square of all entries: the scale below which an entry counts as zero."""
    count = sum(t.numel() for t in tensors)
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors) / count)


def worst_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest relative error and its tensor; floor: 1e-4 of the scale of them all."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    floating = [t for t in want.values() if t.is_floating_point()]
    floor = 1e-4 * scale_of(floating) if floating else 1.0
    worst = (0.0, "")
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        difference = (
            float((got[name].double() - tensor.double()).abs().max()) if tensor.numel() else 0
        )
        scale = max(float(tensor.double().abs().max()) if tensor.numel() else 0.0, floor, 1e-30)
        worst = max(worst, (difference / scale, name))
    return worst
