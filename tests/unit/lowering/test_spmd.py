"""Operators and strategies to one program: a two-layer perceptron by hand."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import InternalError
from autopar.graph.program import Graph, GraphInput, InputKind, Operator, Phase, Ref, TensorMeta
from autopar.layout import PARTIAL, REPLICATE, Layout
from autopar.lowering.program import Communicate, LocalProgram, Port
from autopar.lowering.spmd import lower_program
from autopar.mesh import LogicalMesh
from autopar.runtime.interpreter import run_program
from autopar.runtime.virtual import VirtualCollectives, shard, unshard
from autopar.sharding.registry import RuleTable
from autopar.sharding.strategy import Strategy, strategies

aten = torch.ops.aten
MESH = LogicalMesh((2,))


def _meta(*shape: int) -> TensorMeta:
    return TensorMeta(shape, torch.float64)


def _op(name: str, target: object, args: tuple[object, ...], meta: TensorMeta) -> Operator:
    return Operator(name, target, args, {}, (meta,), Phase.FORWARD)  # type: ignore[arg-type]


def _mlp() -> Graph:
    """y = relu(x w1) w2."""
    inputs = tuple(
        GraphInput(name, InputKind.PARAMETER, _meta(*shape), name)
        for name, shape in (("x", (4, 8)), ("w1", (8, 16)), ("w2", (16, 8)))
    )
    operators = (
        _op("h", aten.mm.default, (Ref("x"), Ref("w1")), _meta(4, 16)),
        _op("a", aten.relu.default, (Ref("h"),), _meta(4, 16)),
        _op("y", aten.mm.default, (Ref("a"), Ref("w2")), _meta(4, 8)),
    )
    return Graph(inputs, operators, ())


def _lower(
    graph: Graph, texts: dict[str, str], inputs: dict[str, Layout], out: Layout
) -> LocalProgram:
    table = RuleTable(graph)
    chosen: dict[str, Strategy] = {}
    for op in graph.operators:
        options = strategies(table.rules[op.name], table.calls[op.name].operands, MESH.axis_sizes)
        chosen[op.name] = next(s for s in options if s.text == texts[op.name])
    ports = {i.name: Port(i.ref, i.meta, table.dims[i.ref], inputs[i.name]) for i in graph.inputs}
    return lower_program(
        graph.operators,
        inputs=ports,
        outputs={"y": (Ref("y"), _meta(4, 8), out)},
        strategies=chosen,
        calls=table.calls,
        rules=table.rules,
        dims=table.dims,
        mesh=MESH.axis_sizes,
    )


MEGATRON = {"h": "j", "a": "d1", "y": "k"}


def _collectives(program: LocalProgram) -> list[str]:
    return [str(i.op) for i in program.body if isinstance(i, Communicate)]


def test_megatron_has_one_all_reduce() -> None:
    layouts: dict[str, Layout] = {"x": (REPLICATE,), "w1": (1,), "w2": (0,)}
    program = _lower(_mlp(), MEGATRON, layouts, (REPLICATE,))
    assert _collectives(program) == ["all_reduce"]
    values = {n: torch.randn(s, dtype=torch.float64) for n, s in
              (("x", (4, 8)), ("w1", (8, 16)), ("w2", (16, 8)))}  # fmt: skip
    got = run_program(
        program,
        {n: shard(values[n], port.dims, port.layout, MESH) for n, port in program.inputs.items()},
        coordinates=[(0,), (1,)],
        collectives=VirtualCollectives(MESH),
        device=torch.device("cpu"),
    )
    port = program.outputs["y"]
    want = (values["x"] @ values["w1"]).relu() @ values["w2"]
    torch.testing.assert_close(unshard(got["y"], port.dims, port.layout, MESH), want)


def test_a_sum_may_stay_pending_or_be_scattered() -> None:
    layouts: dict[str, Layout] = {"x": (REPLICATE,), "w1": (1,), "w2": (0,)}
    assert _collectives(_lower(_mlp(), MEGATRON, layouts, (PARTIAL,))) == []
    assert _collectives(_lower(_mlp(), MEGATRON, layouts, (0,))) == ["reduce_scatter"]


def test_weights_at_rest_are_gathered_for_their_reader() -> None:
    layouts: dict[str, Layout] = {"x": (0,), "w1": (0,), "w2": (0,)}
    data_parallel = {"h": "i", "a": "d0", "y": "i"}
    program = _lower(_mlp(), data_parallel, layouts, (0,))
    assert _collectives(program) == ["all_gather", "all_gather"]


def test_a_value_that_nothing_makes_is_a_bug() -> None:
    graph = _mlp()
    layouts: dict[str, Layout] = {"x": (REPLICATE,), "w1": (1,), "w2": (0,)}
    broken = graph.with_operators(graph.operators[1:])
    with pytest.raises((InternalError, KeyError)):
        _lower(broken, MEGATRON, layouts, (REPLICATE,))
