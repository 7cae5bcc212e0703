"""Builds the intra-op program of one stage on one logical mesh.

Nodes are the stage graph's inputs, operators and outputs; what a node chooses:

    parameter        (layout at rest, layout held through the step, whether it rests on the host)
    batch, received  the layout in which the shard arrives
    operator, hub    a strategy
    gradient         the layout in which it accumulates over microbatches
    sent             the layout in which it leaves

Edges carry reshards, those of parameters and gradients only what is exposed of them. Seconds are
per microbatch; what happens once per step counts 1/B. Bytes are those that stand through the step
and what is saved, times the microbatches in flight; transients come from a schedule of the chosen
strategies (`intraop.memory_use`), not from this sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autopar.errors import OptionError
from autopar.estimate import MeshCosts, local_bytes, local_numel, sums_kept
from autopar.graph.hubs import is_save
from autopar.graph.parameters import gradient_values, parameter_values
from autopar.graph.precision import reduced_after
from autopar.graph.program import (
    Graph,
    GraphInput,
    GraphOutput,
    InputKind,
    OutputKind,
    Phase,
    Ref,
    TensorMeta,
)
from autopar.intraop.execution import exposed_share
from autopar.intraop.problem import FloatArray, IntraOpProblem
from autopar.intraop.stage_problem import (
    Node,
    ParameterChoice,
    Part,
    StageContext,
    StageProblem,
)
from autopar.layout import (
    REPLICATE,
    Dims,
    Layout,
    coarsen,
    is_plain,
    layout_text,
    replicated,
)
from autopar.sharding.registry import RuleTable
from autopar.sharding.strategy import layouts, strategies


class _Builder:
    def __init__(
        self, graph: Graph, table: RuleTable, costs: MeshCosts, context: StageContext
    ) -> None:
        self.graph, self.table, self.costs, self.context = graph, table, costs, context
        self.sizes = costs.mesh.axis_sizes
        self.metas = graph.metas()
        self.phases = {ref: op.phase for op in graph.operators for ref in op.refs}
        self.nodes: list[Node] = []
        self.seconds: list[FloatArray] = []
        self.bytes: list[FloatArray] = []
        self.parts: list[Part] = []
        self.byte_kinds: list[str] = []
        self.edges: dict[tuple[int, int], tuple[FloatArray, Part]] = {}
        self.number: dict[Ref, int] = {}
        self.matrices: dict[Any, FloatArray] = {}
        self.reduced_after = reduced_after(graph)
        self.weights, self.gradients = parameter_values(graph), gradient_values(graph)
        self.exposed = exposed_share(graph, costs, context)

    def add(
        self, node: Node, seconds: FloatArray, nbytes: FloatArray, part: Part, kind: str = ""
    ) -> int:
        self.nodes.append(node)
        self.seconds.append(np.asarray(seconds, dtype=np.float64))
        self.bytes.append(np.asarray(nbytes, dtype=np.float64))
        self.parts.append(part)
        self.byte_kinds.append(kind)
        return len(self.nodes) - 1

    def connect(
        self,
        u: int,
        v: int,
        dims: Dims,
        sources: tuple[Layout, ...],
        targets: tuple[Layout, ...],
        nbytes: float,
        part: Part,
        weight: float = 1.0,
        *,
        keeps_sums: bool = False,
        exposed: float = 1.0,
    ) -> None:
        """An edge for one value; values between the same two nodes add up. keeps_sums: what is
        pending in the source is pending in the target. exposed: of `MeshCosts.reshard`."""
        key = (self.costs.uneven(dims), sources, targets, nbytes, weight, keeps_sums, exposed)
        matrix = self.matrices.get(key)
        if matrix is None:
            matrix = self.costs.reshard_seconds(dims, sources, targets, nbytes, exposed) * weight
            if keeps_sums:
                matrix = np.where(sums_kept(sources, targets), matrix, np.inf)
            self.matrices[key] = matrix
        old = self.edges.get((u, v))
        self.edges[u, v] = (matrix if old is None else old[0] + matrix, part)

    # ---- inputs

    def add_input(self, inp: GraphInput) -> None:
        dims = self.table.dims[inp.ref]
        if inp.kind is InputKind.PARAMETER:
            self.number[inp.ref] = self._parameter(inp, dims)
            return
        free = inp.kind in (InputKind.BATCH, InputKind.RECEIVED)
        choices = layouts(dims, self.sizes) if free else (replicated(len(self.sizes)),)
        seconds = np.zeros(len(choices))
        if inp.kind is InputKind.RECEIVED:
            seconds = np.array(
                [
                    self.costs.receive_seconds(local_bytes(inp.meta, dims, c, self.sizes))
                    for c in choices
                ]
            )
        node = Node("input", inp.name, choices)
        self.number[inp.ref] = self.add(node, seconds, np.zeros(len(choices)), Part.TRANSFER)

    def _parameter(self, inp: GraphInput, dims: Dims) -> int:
        first = next(i for i in self.graph.inputs_of(InputKind.PARAMETER) if i.owner == inp.owner)
        per_step = 1.0 / self.context.num_microbatches
        if first.name != inp.name:
            return self._tied_parameter(inp, dims, self.number[first.ref], per_step)
        choices = parameter_choices(dims, self.sizes)
        pin = (self.context.pins or {}).get(inp.owner)
        if pin is not None:
            choices = _pinned(inp, dims, choices, pin)
        owned = self.context.owned is None or inp.owner in self.context.owned
        if self.context.offload and owned and self.costs.can_offload:
            choices += tuple(c._replace(host=True) for c in choices)
        seconds, nbytes = [], []
        for rest, step, host in choices:
            numel = local_numel(inp.meta, dims, rest, self.sizes)
            at_rest = local_bytes(inp.rest_meta, dims, rest, self.sizes)
            size = 0.0 if host else at_rest
            gather = self.costs.reshard(self.costs.uneven(dims), rest, step, self.exposed)
            cost = gather.seconds(inp.meta.nbytes)
            if host or rest != step or inp.rest is not None:
                size += local_bytes(inp.meta, dims, step, self.sizes)
            if inp.rest is not None:
                narrow = local_bytes(inp.meta, dims, rest, self.sizes)
                cost += self.costs.copy_seconds(at_rest + narrow)
            if host:
                cost += self.costs.host_copy_seconds(at_rest)
            if host and inp.requires_grad:  # the gradient goes there, in the type at rest
                cost += self.costs.host_copy_seconds(at_rest)
                cost += self.costs.host_optimizer_seconds(numel)
            elif owned and inp.requires_grad:
                cost += self.costs.optimizer_seconds(numel)
                size += numel * self.costs.optimizer.state_bytes_per_element
            if not owned:
                cost += self.costs.receive_seconds(at_rest)
            seconds.append(cost * per_step)
            nbytes.append(size)
        node = Node("input", inp.name, choices)
        return self.add(node, np.array(seconds), np.array(nbytes), Part.STEP, "parameter")

    def _tied_parameter(self, inp: GraphInput, dims: Dims, first: int, per_step: float) -> int:
        """A second use in the same stage: made once per step from the first one's layout at
        rest."""
        steps = tuple(c for c in layouts(dims, self.sizes) if is_plain(dims, c, self.sizes))
        choices = tuple(ParameterChoice(s, s) for s in steps)
        nbytes = np.array([local_bytes(inp.meta, dims, s, self.sizes) for s in steps])
        number = self.add(
            Node("input", inp.name, choices), np.zeros(len(steps)), nbytes, Part.STEP, "parameter"
        )
        rests = tuple(c.rest for c in self.nodes[first].choices if isinstance(c, ParameterChoice))
        self.connect(
            first, number, dims, rests, steps, inp.meta.nbytes, Part.STEP, per_step,
            exposed=self.exposed,
        )  # fmt: skip
        return number

    # ---- operators

    def add_operators(self) -> None:
        produced: dict[Ref, tuple[int, tuple[Layout, ...]]] = {}
        for inp in self.graph.inputs:
            choices = self.nodes[self.number[inp.ref]].choices
            columns = tuple(c.step if isinstance(c, ParameterChoice) else c for c in choices)
            produced[inp.ref] = (self.number[inp.ref], columns)  # type: ignore[assignment]
        columns_memo: dict[int, tuple[Any, list[tuple[Layout, ...]], list[tuple[Layout, ...]]]] = {}
        for op in self.graph.operators:
            call, rule = self.table.calls[op.name], self.table.rules[op.name]
            choices = strategies(rule, call.operands, self.sizes)
            memo = columns_memo.get(id(choices))
            if memo is None:
                operand_columns = [
                    tuple(s.operands[i] for s in choices) for i in range(len(call.operands))
                ]
                result_columns = [
                    tuple(s.results[i] for s in choices) for i in range(len(rule.results))
                ]
                memo = columns_memo[id(choices)] = (choices, operand_columns, result_columns)
            _, operand_columns, result_columns = memo
            part = Part.FORWARD if op.phase is Phase.FORWARD else Part.BACKWARD
            nbytes = np.zeros(len(choices))
            kind = ""
            if is_save(op):
                meta, made = op.results[0], self.table.dims[Ref(op.name)]
                assert meta is not None
                kind = "saved"
                nbytes = self.context.in_flight * np.array(
                    [local_bytes(meta, made, s.results[0], self.sizes) for s in choices]
                )
            seconds = self.costs.operator_seconds(op, call, rule, choices, self.metas)
            number = self.add(Node("operator", op.name, choices), seconds, nbytes, part, kind)
            for index, ref in enumerate(op.operands):
                source, columns = produced[ref]
                hidden = ref.name in self.weights or op.name in self.gradients
                self.connect(
                    source, number, call.operands[index], columns, operand_columns[index],
                    self.metas[ref].nbytes, part, keeps_sums=op.name in self.reduced_after,
                    exposed=self.exposed if hidden else 1.0,
                )  # fmt: skip
            for index in range(len(rule.results)):
                produced[Ref(op.name, index)] = (number, result_columns[index])
        self.produced = produced

    # ---- outputs

    def add_output(self, out: GraphOutput) -> None:
        source, columns = self.produced[out.ref]
        dims, meta = self.table.dims[out.ref], self.metas[out.ref]
        phase = Part.FORWARD if self._phase_of(out.ref) is Phase.FORWARD else Part.BACKWARD
        if out.kind is OutputKind.GRADIENT:
            self._gradient(out, source, columns, dims, meta)
            return
        free = out.kind is OutputKind.SENT
        choices = layouts(dims, self.sizes) if free else (replicated(len(self.sizes)),)
        zeros = np.zeros(len(choices))
        name = out.target if out.target else out.kind.value
        number = self.add(Node("output", name, choices), zeros, zeros, phase)
        self.connect(source, number, dims, columns, choices, meta.nbytes, phase)

    def _gradient(
        self,
        out: GraphOutput,
        source: int,
        columns: tuple[Layout, ...],
        dims: Dims,
        meta: TensorMeta,
    ) -> None:
        """Accumulates in a layout of its own; reduced once per step to the parameter's at rest."""
        partial = meta.dtype.is_floating_point
        choices = tuple(
            c for c in layouts(dims, self.sizes, partial=partial) if is_plain(dims, c, self.sizes)
        )
        count = self.context.num_microbatches
        held = np.array([local_bytes(meta, dims, c, self.sizes) for c in choices])
        seconds = np.array([self.costs.accumulate_seconds(n, count) for n in held])
        stand = count > 1  # those of one are its backward's
        node = Node("output", out.target, choices)
        number = self.add(node, seconds, stand * held, Part.BACKWARD, "gradient")
        self.connect(
            source, number, dims, columns, choices, meta.nbytes, Part.BACKWARD,
            exposed=self.exposed,
        )  # fmt: skip
        inp = next(i for i in self.graph.inputs if i.name == out.target)
        first = next(i for i in self.graph.inputs_of(InputKind.PARAMETER) if i.owner == inp.owner)
        parameter = self.number[first.ref]
        rests = tuple(
            c.rest for c in self.nodes[parameter].choices if isinstance(c, ParameterChoice)
        )
        coarse = tuple(coarsen(dims, c, self.sizes)[1] for c in choices)
        nbytes_moved = meta.numel * (inp.reduce or meta.dtype).itemsize
        own = self.table.dims[first.ref]
        matrix = self.costs.reshard_seconds(own, coarse, rests, nbytes_moved, self.exposed).T
        self.edges[parameter, number] = (np.ascontiguousarray(matrix / count), Part.STEP)

    def _phase_of(self, ref: Ref) -> Phase:
        return self.phases.get(ref, Phase.FORWARD)

    def build(self) -> StageProblem:
        for inp in self.graph.inputs:
            self.add_input(inp)
        self.add_operators()
        for out in self.graph.outputs:
            self.add_output(out)
        problem = IntraOpProblem(
            node_names=tuple(f"{n.kind}:{n.name}" for n in self.nodes),
            node_seconds=tuple(self.seconds),
            node_bytes=tuple(self.bytes),
            edges=tuple(self.edges),
            edge_seconds=tuple(m for m, _ in self.edges.values()),
            node_layers=self._layers(),
        )
        return StageProblem(
            problem,
            tuple(self.nodes),
            tuple(self.parts),
            tuple(p for _, p in self.edges.values()),
            tuple(self.byte_kinds),
            received={i.name: (i.meta, i.phase) for i in self.graph.inputs_of(InputKind.RECEIVED)},
            sent={
                o.target: (self.metas[o.ref], self._phase_of(o.ref))
                for o in self.graph.outputs_of(OutputKind.SENT)
            },
            dims=self.table.dims,
        )

    def _layers(self) -> tuple[int, ...]:
        """Of each node: an input's is that of its first reader, an output's that of its maker."""
        made, read = dict[Ref, int](), dict[Ref, int]()
        for op in self.graph.operators:
            made |= dict.fromkeys(op.refs, op.layer)
            read |= {ref: min(read.get(ref, op.layer), op.layer) for ref in op.operands}
        first = (read.get(inp.ref, 0) for inp in self.graph.inputs)
        last = (made.get(out.ref, 0) for out in self.graph.outputs)
        return (*first, *(op.layer for op in self.graph.operators), *last)


def _pinned(
    inp: GraphInput, dims: Dims, choices: Sequence[ParameterChoice], pin: str
) -> tuple[ParameterChoice, ...]:
    """The choices at rest in the layout of a pin."""
    rests = dict.fromkeys(layout_text(dims, c.rest) for c in choices)
    if (text := " ".join(pin.split())) not in rests:
        raise OptionError(
            f"parameter {inp.owner!r} {inp.meta} cannot be placed as {pin!r} on this mesh: "
            f"it can be "
            f"{', '.join(map(repr, rests))}"
        )
    return tuple(c for c in choices if layout_text(dims, c.rest) == text)


def parameter_choices(dims: Dims, sizes: Sequence[int]) -> tuple[ParameterChoice, ...]:
    """Every plain layout at rest, and for each the layouts that gather some of its axes for the
    step.

    (rest = step): gathered at each use if a use needs more, ZeRO-3; (S, R): gathered once per step,
    ZeRO-1 and 2; (R, R): replicated, DDP; tensor parallel layouts are rest = step without a gather.
    """
    found = []
    for rest in layouts(dims, tuple(sizes)):
        if not is_plain(dims, rest, tuple(sizes)):
            continue
        sharded = [axis for axis, p in enumerate(rest) if p >= 0]
        for mask in range(1 << len(sharded)):
            step = list(rest)
            for bit, axis in enumerate(sharded):
                if mask >> bit & 1:
                    step[axis] = REPLICATE
            found.append(ParameterChoice(rest, tuple(step)))
    return tuple(found)


def build_problem(
    graph: Graph, table: RuleTable, costs: MeshCosts, context: StageContext
) -> StageProblem:
    """The program of one prepared stage. O(operators x strategies^2), matrices shared."""
    return _Builder(graph, table, costs, context).build()
