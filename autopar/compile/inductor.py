"""A traced program as one callable of Inductor.

`compile_fx_inner` is given the graph as it is: no Dynamo, no AOTAutograd. Inductor fuses and plans
buffers; the order of collectives and products is that of the graph (`compile.overlap`), which the
flags below keep.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from autopar.compile.noise import dropout
from autopar.compile.pooling import max_pool_backward
from autopar.compile.reductions import kept_rows
from autopar.compile.renames import kept_renames
from autopar.compile.split_sums import joined_sums

# By default Inductor sorts for the lowest peak, which waits for every collective where it starts.
FLAGS = {
    "reorder_for_peak_memory": False,
    "reorder_for_locality": False,
    "reorder_for_compute_comm_overlap": False,
}

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
"""Empties its argument, so that inputs that nobody else holds are freed after their last use."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a result will look like, with the strides that Inductor gives it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def fake(self, mode: FakeTensorMode) -> Tensor:
        with mode:
            return torch.empty_strided(
                self.shape, self.strides, dtype=self.dtype, device=self.device
            )


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """call: wants inputs with the strides of the graph's."""

    call: Compiled
    results: tuple[Result, ...]


@functools.cache
def register_loops() -> None:
    """Tells Inductor of ours, once per process. Its own module is loaded then: seconds."""
    from torch._inductor.lowering import register_lowering

    own = torch.ops.autopar
    for target, loop in (
        (own.keyed_dropout.default, dropout),
        (own.max_pool_backward.default, max_pool_backward),
    ):
        register_lowering(target, type_promotion_kind=None)(loop)


def compile_module(module: fx.GraphModule) -> CompiledModule:
    """Pre: a flat graph of ATen operators and collectives, with fake values on every node. Seconds
    to a minute."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    register_loops()
    fakes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    context = torch._guards.TracingContext(fakes[0].fake_mode)
    context.output_strides = []
    changed = (config.patch(FLAGS), kept_rows(), joined_sums(), kept_renames())
    with torch.no_grad(), torch._guards.tracing(context), contextlib.ExitStack() as stack:
        for change in changed:
            stack.enter_context(change)
        call: Any = compile_fx_inner(module, fakes, is_backward=False, is_inference=False)
    outputs: Any = module.graph.output_node().args[0]
    made = [node.meta["val"] for node in outputs]
    strides = context.output_strides or [None] * len(made)  # none are told of a graph of no calls
    results = tuple(
        Result(tuple(v.shape), v.stride() if s is None else s, v.dtype, v.device)
        for v, s in zip(made, strides, strict=True)
    )
    return CompiledModule(call, results)
