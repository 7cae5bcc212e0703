"""Bytes that Inductor's code of a graph would hold or move on a GPU, by its own lowering and
scheduler.

No code is made: the graph is lowered with the rules for GPUs, although its values are on the CPU,
and each buffer lives from the kernel that makes it to the last one that reads it. A kernel may
write over an operand of the same size that it is the last to read, and keeps to itself what it
makes and nobody else reads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import config, ir, scheduler
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch._inductor.virtualized import V

from autopar.compile.inductor import FLAGS, register_loops

_NO_MEMORY = (ir.NoneLayout, ir.MultiOutputLayout, ir.MutationLayoutSHOULDREMOVE)


def peak_bytes(module: fx.GraphModule) -> float:
    """The most that is alive beside the inputs. Pre: a flat graph with fake values."""
    with _lowered(module) as lowering:
        return _peak(lowering.scheduler, set(lowering.get_output_names()))


def moved_bytes(module: fx.GraphModule) -> int:
    """What the fused kernels read and write: each value once per kernel. Loops may be put in
    another order for a fusion, and concatenations are pointwise. Pre: as above."""
    with _fused_as_on_gpus(), _lowered(module) as lowering:
        fused = [n for n in lowering.scheduler.nodes if not isinstance(n.node, ir.ExternKernel)]
        return sum(int(node.get_read_write_buffers_sizes()) for node in fused)


@contextmanager
def _fused_as_on_gpus() -> Iterator[None]:
    with (
        mock.patch.object(Scheduler, "create_backend", lambda s, _: TritonScheduling(s)),
        mock.patch.object(BaseSchedulerNode, "is_cpu", lambda _: False),
        mock.patch.object(scheduler, "is_gpu", lambda _: True),
        mock.patch.object(ir, "is_gpu", lambda _: True),
        config.patch(force_pointwise_cat=True),
    ):
        yield


@contextmanager
def _lowered(module: fx.GraphModule) -> Iterator[Any]:
    register_loops()
    fakes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    mode = fakes[0].fake_mode
    lowering: Any = GraphLowering(module, example_inputs=fakes)
    with (
        torch.no_grad(),
        torch._guards.tracing(torch._guards.TracingContext(mode)),
        config.patch(FLAGS),
        V.set_fake_mode(mode),
        V.set_graph_handler(lowering),
        V.set_debug_handler(DebugContext()),
        mock.patch.object(ir, "is_cpu", lambda *_: False),
    ):
        lowering.run(*fakes)
        lowering._update_scheduler()
        yield lowering


def _is_local(scheduler: Any, node: BaseSchedulerNode, name: str) -> bool:
    """As `Kernel.remove_kernel_local_buffers` decides when code is made."""
    parts = {part.get_name() for part in node.get_nodes()}
    return len(parts) > 1 and scheduler.can_buffer_be_removed_through_fusion(name, parts)


def _peak(scheduler: Any, outputs: set[str]) -> float:
    nodes = scheduler.nodes
    sizes: dict[str, int] = {}
    born: dict[str, int] = {}
    last: dict[str, int] = {}
    roots: dict[str, str] = {}  # of views and of what is written in place
    for time, node in enumerate(nodes):
        for buffer in node.get_outputs():
            name = buffer.get_name()
            layout = buffer.node.maybe_get_layout()
            held = layout is not None and not isinstance(layout, _NO_MEMORY)
            held = held and not _is_local(scheduler, node, name)
            others = [*buffer.get_aliases(), *buffer.get_mutations()]
            roots[name] = roots.get(others[0], others[0]) if others else name
            born[name] = time
            sizes[name] = 0
            if held and not others and name not in V.graph.removed_buffers:
                sizes[name] = math.prod(map(int, layout.size)) * layout.dtype.itemsize
        for dep in (*node.read_writes.reads, *node.unmet_dependencies):
            if type(dep).__name__ != "WeakDep" and dep.name in roots:
                last[roots[dep.name]] = time
    for name in outputs & roots.keys():
        last[roots[name]] = len(nodes)
    changes: defaultdict[int, float] = defaultdict(float)
    taken: set[str] = set()
    for name, start in sorted(born.items(), key=lambda item: item[1]):
        changes[start] += sizes[name]
        changes[last.get(name, start) + 1] -= sizes[name]
        reads = {roots.get(dep.name, "") for dep in nodes[start].read_writes.reads}
        over = [r for r in reads - taken if last.get(r) == start and sizes.get(r) == sizes[name]]
        if over and sizes[name] and isinstance(nodes[start].node, ir.ComputedBuffer):
            taken.add(over[0])
            changes[start] -= sizes[name]  # what it writes over ends here, not after
            changes[start + 1] += sizes[name]
    alive = peak = 0.0
    for time in sorted(changes):
        alive += changes[time]
        peak = max(peak, alive)
    return peak
