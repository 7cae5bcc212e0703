"""The SPMD rewrite: operators and their strategies to one local program.

One pass in execution order: each operand is resharded from the layout in which it was made to the
one that the strategy reads, at most once per layout; then the operator's own lowering runs.
O(operators).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from autopar.graph.hubs import is_hub
from autopar.graph.program import Operator, Ref, TensorMeta
from autopar.layout import Dims, Layout, MeshSizes, local_shape
from autopar.lowering.composites import Site, lower_call
from autopar.lowering.emitter import Emitter
from autopar.lowering.program import LocalProgram, Port, check_program
from autopar.lowering.shapes import check_shapes
from autopar.sharding.rule import Call, Rule
from autopar.sharding.strategy import Strategy


def lower_program(
    operators: Iterable[Operator],
    *,
    inputs: Mapping[str, Port],
    outputs: Mapping[str, tuple[Ref, TensorMeta, Layout]],
    strategies: Mapping[str, Strategy],
    calls: Mapping[str, Call],
    rules: Mapping[str, Rule],
    dims: Mapping[Ref, Dims],
    mesh: MeshSizes,
    constants: Mapping[str, torch.Tensor] | None = None,
    verify: bool = False,
) -> LocalProgram:
    """Pre: every operator has a strategy; every value read is an input or made before it is read.
    Post: each operand is in the layout that its reader's strategy names (check_program). verify:
    check_shapes as well.

    inputs and outputs: by key; a Port's ref is the graph value it stands for.
    """
    emit = Emitter(mesh)
    shapes: dict[Ref, tuple[int, ...]] = {}  # of local values that stand for results
    ports: dict[str, Port] = {}
    for number, (key, port) in enumerate(inputs.items()):
        local = Ref(f"in{number}_{port.ref.name}")
        emit.define(port.ref, port.dims, port.layout, local)
        ports[key] = replace(port, ref=local)
    for op in operators:
        strategy = strategies[op.name]
        emit.origin = op.name
        if is_hub(op):  # a resharding point: no instruction of its own
            layout = strategy.results[0]
            local = emit.get(op.operands[0], layout)
            emit.define(Ref(op.name), dims[Ref(op.name)], layout, local)
            continue
        locals_ = [
            emit.get(ref, layout)
            for ref, layout in zip(op.operands, strategy.operands, strict=True)
        ]
        emit.origin = op.name
        rule, call = rules[op.name], calls[op.name]
        for number, axis, value in strategy.fills:
            layout = strategy.operands[number]
            locals_[number] = emit.fill(locals_[number], call.operands[number], layout, axis, value)
        site = Site(emit, op, call, rule, strategy, tuple(locals_))
        results_ = lower_call(site)
        for index, result_dims in enumerate(rule.results):
            if result_dims is not None:
                layout = strategy.results[index]
                emit.define(Ref(op.name, index), result_dims, layout, results_[index])
                shapes[results_[index]] = local_shape(result_dims, layout, mesh)
    emit.origin = "out"
    results = {
        key: Port(emit.get(ref, layout), meta, dims[ref], layout)
        for key, (ref, meta, layout) in outputs.items()
    }
    program = check_program(LocalProgram(ports, tuple(emit.body), results, dict(constants or {})))
    if verify:
        check_shapes(program, shapes, mesh)
    return program
