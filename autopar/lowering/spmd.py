"""The SPMD rewrite: operators and their strategies to one local program.

One pass in execution order: each operand is resharded from the layout in which it was made to the
one that the strategy reads, at most once per layout; then the operator's own lowering runs.
O(operators).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from autopar.graph.program import Operator, Ref, TensorMeta
from autopar.layout import Dims, Layout, MeshSizes
from autopar.lowering.composites import Site, lower_call
from autopar.lowering.emitter import Emitter
from autopar.lowering.hubs import is_hub
from autopar.lowering.program import LocalProgram, Port, check_program
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
) -> LocalProgram:
    """Pre: every operator has a strategy; every value read is an input or made before it is read.
    Post: each operand is in the layout that its reader's strategy names (check_program).

    inputs and outputs: by key; a Port's ref is the graph value it stands for.
    """
    emit = Emitter(mesh)
    ports: dict[str, Port] = {}
    for number, (key, port) in enumerate(inputs.items()):
        local = Ref(f"in{number}_{port.ref.name}")
        emit.define(port.ref, port.dims, port.layout, local)
        ports[key] = Port(local, port.meta, port.dims, port.layout)
    for op in operators:
        strategy = strategies[op.name]
        emit.origin = op.name
        if is_hub(op):  # a resharding point: no instruction of its own
            layout = strategy.results[0]
            local = emit.get(op.operands[0], layout)
            emit.define(Ref(op.name), dims[Ref(op.name)], layout, local)
            continue
        locals_ = tuple(
            emit.get(ref, layout)
            for ref, layout in zip(op.operands, strategy.operands, strict=True)
        )
        emit.origin = op.name
        rule = rules[op.name]
        site = Site(emit, op, calls[op.name], rule, strategy, locals_)
        _define_results(emit, op, rule, strategy, lower_call(site))
    emit.origin = "out"
    results = {
        key: Port(emit.get(ref, layout), meta, dims[ref], layout)
        for key, (ref, meta, layout) in outputs.items()
    }
    program = LocalProgram(ports, tuple(emit.body), results, dict(constants or {}))
    return check_program(program)


def _define_results(
    emit: Emitter, op: Operator, rule: Rule, strategy: Strategy, locals_: Sequence[Ref]
) -> None:
    for index, result_dims in enumerate(rule.results):
        if result_dims is not None:
            layout = strategy.results[index]
            emit.define(Ref(op.name, index), result_dims, layout, locals_[index])
