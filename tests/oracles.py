"""Oracles: what a rule, a lowering or a plan must agree with.

The rule oracle takes every distinct signature of a graph with the values that it really gets, and
for every strategy runs the operator whole and on shards: recombined results must agree. Pending
sums are split at random into integers and a rest, so that an operator that is not linear is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autopar.errors import VerificationError
from autopar.graph.execute import run_operator
from autopar.graph.program import Graph, InputKind, Operator, Phase, Ref, TensorMeta, map_refs
from autopar.layout import Dims, Layout, raw_dims
from autopar.lowering.program import Port
from autopar.lowering.spmd import lower_program
from autopar.mesh import LogicalMesh
from autopar.runtime.interpreter import run_program
from autopar.runtime.virtual import VirtualCollectives, shard, unshard
from autopar.sharding.registry import RuleTable, make_call, rule_for
from autopar.sharding.rule import Call, Rule
from autopar.sharding.strategy import Strategy, layouts, strategies

MESHES = (LogicalMesh((2,)), LogicalMesh((4,)), LogicalMesh((2, 2)))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """One operator with the values that it got and made."""

    op: Operator
    call: Call
    operands: tuple[Tensor, ...]
    results: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Disagreement:
    sample: Sample
    strategy: Strategy
    mesh: LogicalMesh
    result: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.sample.op.op_name} under [{self.strategy.text}] on {self.mesh}: result "
            f"{self.result} is off by {self.error:.3g}; operands {self.sample.call.operands}"
        )


def samples(graph: Graph, inputs: Mapping[str, Tensor]) -> Iterator[Sample]:
    """The first operator of each distinct signature, with real values."""
    table = RuleTable(graph)
    values: dict[Ref, Tensor] = {i.ref: inputs[i.name].detach() for i in graph.inputs}
    seen = set()
    with torch.no_grad():
        for op in graph.operators:
            results = run_operator(op, values, CPU)
            call = table.calls[op.name]
            if call not in seen:
                seen.add(call)
                operands = tuple(values[ref] for ref in op.operands)
                yield Sample(op, call, operands, tuple(results))
            values.update((ref, results[ref.index]) for ref in op.refs)


def make_sample(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dims: Callable[[int, tuple[int, ...]], Dims] = lambda _number, shape: raw_dims(shape),
) -> Sample:
    """A call made by hand. dims: the atoms of operand number i of a shape. A tensor that is passed
    twice is one value."""
    refs: dict[int, Ref] = {}
    values: dict[Ref, Tensor] = {}

    def named(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            ref = refs.setdefault(id(tree), Ref(f"x{len(refs)}"))
            values[ref] = tree
            return ref
        if isinstance(tree, (tuple, list)):
            return type(tree)(named(item) for item in tree)
        return tree

    arguments = named(tuple(args))
    keywords = {key: named(item) for key, item in (kwargs or {}).items()}
    op = Operator("op", target, arguments, keywords, (), Phase.FORWARD)
    with torch.no_grad():
        results = tuple(run_operator(op, values, CPU))
    metas = tuple(None if r is None else TensorMeta(tuple(r.shape), r.dtype) for r in results)
    op = replace(op, results=metas)
    operands = tuple(dict.fromkeys(op.operands))
    all_dims = {ref: dims(i, tuple(values[ref].shape)) for i, ref in enumerate(operands)}
    value_metas = {ref: TensorMeta(tuple(t.shape), t.dtype) for ref, t in values.items()}
    call = make_call(op, all_dims, value_metas, set())
    return Sample(op, call, tuple(values[ref] for ref in op.operands), results)


def disagreements(
    sample: Sample,
    mesh: LogicalMesh,
    *,
    make_rule: Callable[[Call], Rule] = rule_for,
    tolerance: float = 1e-9,
    generator: torch.Generator,
) -> tuple[int, list[Disagreement]]:
    """(strategies tried, those whose recombined results differ from the whole)."""
    rule = make_rule(sample.call)
    found: list[Disagreement] = []
    choices = strategies(rule, sample.call.operands, mesh.axis_sizes)
    for strategy in choices:
        try:
            whole = _run_sharded(sample, rule, strategy, mesh, generator)
        except VerificationError:
            found.append(Disagreement(sample, strategy, mesh, -1, float("inf")))
            continue
        for index, got in whole.items():
            want = sample.results[index]
            assert want is not None
            error = relative_error(got, want)
            if not error <= tolerance:
                found.append(Disagreement(sample, strategy, mesh, index, error))
    return len(choices), found


def relative_error(got: Tensor, want: Tensor, floor: float = 1.0) -> float:
    """Largest difference relative to the larger of the largest entry of `want` and `floor`."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, 0.0, (got - want).abs())
    finite = want[want.isfinite()]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, floor)
    return float(difference.max()) / scale


def _run_sharded(
    sample: Sample, rule: Rule, strategy: Strategy, mesh: LogicalMesh, generator: torch.Generator
) -> dict[int, Tensor]:
    """Results recombined from shards."""
    op = sample.op
    inputs: dict[str, Port] = {}
    shards = {}
    fresh = _distinct_operands(op)
    for number, (ref, dims) in enumerate(zip(fresh.operands, sample.call.operands, strict=True)):
        whole, layout, key = sample.operands[number], strategy.operands[number], str(number)
        inputs[key] = Port(ref, _meta(whole), dims, layout)
        shards[key] = shard(whole, dims, layout, mesh, generator)
    outputs = {
        str(i): (Ref(op.name, i), meta, strategy.results[i])
        for i, meta in enumerate(sample.call.results)
        if meta is not None
    }
    program = lower_program(
        [fresh],
        inputs=inputs,
        outputs=outputs,
        strategies={op.name: strategy},
        calls={op.name: sample.call},
        rules={op.name: rule},
        dims={Ref(op.name, i): d for i, d in enumerate(rule.results) if d is not None},
        mesh=mesh.axis_sizes,
    )
    with torch.no_grad():
        got = run_program(
            program,
            shards,
            coordinates=[mesh.coordinates(r) for r in range(mesh.num_devices)],
            collectives=VirtualCollectives(mesh),
            device=CPU,
        )
    return {
        int(key): unshard(got[key], port.dims, port.layout, mesh)
        for key, port in program.outputs.items()
    }


def _meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), tensor.dtype)


def _distinct_operands(op: Operator) -> Operator:
    """The same operator with a name of its own for every operand, so that one value passed twice
    may come in two layouts."""
    numbers = iter(range(len(op.operands)))
    args, kwargs = map_refs((op.args, dict(op.kwargs)), lambda _: Ref(f"operand{next(numbers)}"))
    return replace(op, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Draw:
    """A random plan of a whole graph on one mesh: any strategy, any layout of every input."""

    graph: Graph
    table: RuleTable
    mesh: LogicalMesh
    strategies: Mapping[str, Strategy]
    inputs: Mapping[str, Port]

    @classmethod
    def make(
        cls, graph: Graph, table: RuleTable, mesh: LogicalMesh, generator: torch.Generator
    ) -> Draw:
        chosen = random_strategies(graph, table, mesh.axis_sizes, generator)
        ports = {}
        for inp in graph.inputs:
            dims, is_parameter = table.dims[inp.ref], inp.kind is InputKind.PARAMETER
            choices = layouts(dims, mesh.axis_sizes, partial=is_parameter)
            pick = int(torch.randint(len(choices), (1,), generator=generator))
            ports[inp.name] = Port(inp.ref, inp.meta, dims, choices[pick])
        return cls(graph, table, mesh, chosen, ports)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, tuple[Ref, TensorMeta, Layout]],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The outputs of one program over the whole graph, recombined."""
        table, mesh = self.table, self.mesh
        program = lower_program(
            self.graph.operators,
            inputs=self.inputs,
            outputs=outputs,
            strategies=self.strategies,
            calls=table.calls,
            rules=table.rules,
            dims=table.dims,
            mesh=mesh.axis_sizes,
        )
        shards = {
            name: shard(inputs[name], port.dims, port.layout, mesh, generator)
            for name, port in self.inputs.items()
        }
        with torch.no_grad():
            got = run_program(
                program,
                shards,
                coordinates=[mesh.coordinates(r) for r in range(mesh.num_devices)],
                collectives=VirtualCollectives(mesh),
                device=CPU,
            )
        return {
            key: unshard(got[key], port.dims, port.layout, mesh)
            for key, port in program.outputs.items()
        }

    def first_wrong(
        self,
        inputs: Mapping[str, Tensor],
        generator: torch.Generator,
        tolerance: float = 1e-8,
    ) -> str:
        """The first operator whose value differs from the reference, with its strategy; "" if
        none."""
        metas = self.graph.metas()
        refs = {str(ref): (op, ref) for op in self.graph.operators for ref in op.refs}
        outputs = {
            key: (ref, metas[ref], self.strategies[op.name].results[ref.index])
            for key, (op, ref) in refs.items()
        }
        got = self.run(inputs, outputs, generator)
        values: dict[Ref, Tensor] = {i.ref: inputs[i.name].detach() for i in self.graph.inputs}
        with torch.no_grad():
            for op in self.graph.operators:
                results = run_operator(op, values, CPU)
                values.update((ref, results[ref.index]) for ref in op.refs)
        for key, (op, ref) in refs.items():
            error = relative_error(got[key], values[ref])
            if not error <= tolerance:
                return f"{op} under [{self.strategies[op.name].text}] is off by {error:.3g}"
        return ""


def widened(tree: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: widened(item) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(widened(item) for item in tree)
    return tree


def random_strategies(
    graph: Graph, table: RuleTable, mesh: Sequence[int], generator: torch.Generator
) -> dict[str, Strategy]:
    """Any valid strategy for every operator."""
    chosen = {}
    for op in graph.operators:
        call = table.calls[op.name]
        choices = strategies(table.rules[op.name], call.operands, tuple(mesh))
        pick = int(torch.randint(len(choices), (1,), generator=generator))
        chosen[op.name] = choices[pick]
    return chosen
