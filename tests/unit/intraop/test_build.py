"""The program of a stage: its objective and bytes mean what the estimates say."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from autopar.errors import OptionError
from autopar.estimate import EXPOSED_SHARE, MeshCosts
from autopar.graph.hubs import is_save
from autopar.graph.program import InputKind, OutputKind, Phase
from autopar.intraop.build import build_problem, parameter_choices
from autopar.intraop.stage_problem import ParameterChoice, Part, StageContext
from autopar.layout import coarsen, local_atoms
from autopar.lowering.lower import prepare_stages
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from cost_models import Cluster, CollectiveKind, collective_coefficients
from tests.unit.intraop.stages import costs_of, gpt2_graph, stage_of

CONTEXT = StageContext(num_microbatches=4, in_flight=3)


@pytest.mark.parametrize("name", ["mlp", "attention", "tied"])
@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=str)
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_objective_and_bytes_equal_a_recount(
    name: str, mesh: tuple[int, ...], offload: bool
) -> None:
    stage, costs = stage_of(name), costs_of(mesh)
    graph, table, metas = stage.graph, stage.table, stage.graph.metas()
    built = build_problem(graph, table, costs, replace(CONTEXT, offload=offload))
    rng = random.Random(0)
    for _ in range(5):
        choice = tuple(rng.randrange(len(node.choices)) for node in built.nodes)
        chosen = built.read(choice)
        layout = dict(chosen.inputs)
        made = {i.ref: layout[i.name] for i in graph.inputs}
        seconds, once, saved = 0.0, 0.0, 0.0
        for op in graph.operators:
            strategy = chosen.strategies[op.name]
            call = table.calls[op.name]
            seconds += float(
                costs.operator_seconds(op, call, table.rules[op.name], [strategy], metas)[0]
            )
            for ref, wanted in zip(op.operands, strategy.operands, strict=True):
                seconds += costs.reshard(table.dims[ref], made[ref], wanted).seconds(
                    metas[ref].nbytes
                )
            made.update((ref, strategy.results[ref.index]) for ref in op.refs)
            if is_save(op):
                count = 1
                for atom in local_atoms(table.dims[op.refs[0]], strategy.results[0], mesh):
                    count *= atom
                saved += 3 * count * metas[op.refs[0]].dtype.itemsize
        held: dict[str, str] = {}
        standing = 0.0
        for inp in graph.inputs_of(InputKind.PARAMETER):
            rest, step, host = chosen.parameters[inp.name]
            first = held.setdefault(inp.owner, inp.name)
            shards = {"rest": 1, "step": 1}
            for size, r, s in zip(mesh, rest, step, strict=True):
                shards["rest"] *= size if r >= 0 else 1
                shards["step"] *= size if s >= 0 else 1
            if first == inp.name:
                once += costs.reshard(table.dims[inp.ref], rest, step).seconds(inp.meta.nbytes)
                numel, nbytes = (
                    whole / shards["rest"] for whole in (inp.meta.numel, inp.meta.nbytes)
                )
                if host:  # there and back, and AdamW on it: 28 bytes moved per element
                    once += 2 * (5e-6 + nbytes / 53.6e9) + 28 * numel / 38.4e9
                else:
                    once += costs.optimizer_seconds(numel)
                    standing += 3 * nbytes
                standing += 0 if rest == step and not host else inp.meta.nbytes / shards["step"]
            else:
                source = chosen.parameters[first].rest
                once += costs.reshard(table.dims[inp.ref], source, step).seconds(inp.meta.nbytes)
                standing += inp.meta.nbytes / shards["step"]
        gradients = 0.0
        owners = {i.name: i.owner for i in graph.inputs}
        for out in graph.outputs:
            target = chosen.outputs[out.target or out.kind.value]
            seconds += costs.reshard(table.dims[out.ref], made[out.ref], target).seconds(
                metas[out.ref].nbytes
            )
            if out.kind is OutputKind.GRADIENT:
                rest = chosen.parameters[held[owners[out.target]]].rest
                dims, accumulated = coarsen(table.dims[out.ref], target, mesh)
                once += costs.reshard(dims, accumulated, rest).seconds(metas[out.ref].nbytes)
                shards_of = 1
                for size, placement in zip(mesh, target, strict=True):
                    shards_of *= size if placement >= 0 else 1
                nbytes = metas[out.ref].nbytes / shards_of
                gradients += nbytes
                # added to those before, in three microbatches of four: two reads and a write
                seconds += 0.75 * (costs.device.launch_s + costs.copy_seconds(3 * nbytes))
        assert built.problem.seconds(choice) == pytest.approx(seconds + once / 4, rel=1e-9)
        parts = built.part_seconds(choice)
        assert parts[Part.STEP] == pytest.approx(once / 4, rel=1e-9)
        assert sum(parts.values()) == pytest.approx(built.problem.seconds(choice), rel=1e-9)
        nbytes = built.kind_bytes(choice)
        assert nbytes["saved"] == pytest.approx(saved)
        assert nbytes["gradient"] == pytest.approx(gradients)
        assert nbytes["parameter"] == pytest.approx(standing)
        assert sum(nbytes.values()) == pytest.approx(built.problem.bytes(choice))


def test_a_compiled_step_pays_what_is_exposed_of_parameters() -> None:
    """Gathers of parameters and reductions of gradients, not what the next operator waits for; in
    full where the mesh is one stage of a pipeline."""
    stage, alone = stage_of("mlp"), costs_of((2,))
    pipelined = MeshCosts(Cluster.parse("h100:1x4"), alone.mesh)
    one, full = (
        build_problem(stage.graph, stage.table, costs, StageContext(compiled=True)).problem
        for costs in (alone, pipelined)
    )
    names = one.node_names
    edges = zip(one.edges, one.edge_seconds, full.edge_seconds, strict=True)
    changed = {(names[u], names[v]): (ours, whole) for (u, v), ours, whole in edges}
    changed = {edge: pair for edge, pair in changed.items() if not np.array_equal(*pair)}
    up, down = "input:parameter_up_weight", "input:parameter_down_weight"
    assert set(changed) == {
        (up, "operator:t"),
        ("operator:t", "operator:mm"),
        (down, "operator:t_1"),
        ("operator:t_1", "operator:mm_1"),
        (down, "operator:mm_3"),
        ("operator:mm_4", "output:parameter_up_weight"),
        ("operator:mm_2", "output:parameter_down_weight"),
        (up, "output:parameter_up_weight"),
        (down, "output:parameter_down_weight"),
    }
    nbytes, link = 64 * 256 * 4, alone.mesh.path(0, alone.cluster)
    scatter = collective_coefficients(CollectiveKind.REDUCE_SCATTER, 2, link).seconds(nbytes)
    ours, whole = changed[up, "output:parameter_up_weight"]
    at = np.isclose(whole, scatter)  # pending to sharded by rows
    assert at.any() and ours[at] == pytest.approx(EXPOSED_SHARE * whole[at])
    gather = collective_coefficients(CollectiveKind.ALL_GATHER, 2, link).seconds(nbytes)
    saved = full.node_seconds[names.index(up)] - one.node_seconds[names.index(up)]
    assert saved.max() == pytest.approx((1 - EXPOSED_SHARE) * gather)
    same = [n for n in range(len(names)) if names[n] not in (up, down)]
    assert all(np.array_equal(one.node_seconds[n], full.node_seconds[n]) for n in same)


def test_zero_stages_are_choices() -> None:
    choices = parameter_choices(((8,), (4,)), (2,))
    assert {(c.rest, c.step) for c in choices} == {
        ((-1,), (-1,)),
        ((0,), (0,)),
        ((0,), (-1,)),
        ((1,), (1,)),
        ((1,), (-1,)),
    }


def test_hosts_are_choices_where_they_are_allowed_and_known() -> None:
    stage, cpu = stage_of("tied"), MeshCosts(Cluster.parse("cpu:1x2"), LogicalMesh((2,)))
    allowed, other = StageContext(offload=True), StageContext(offload=True, owned=frozenset())
    for costs, context, num_on_host in (
        (costs_of((2,)), StageContext(), 0),
        (costs_of((2,)), other, 0),  # another stage has it
        (cpu, allowed, 0),
        (costs_of((2,)), allowed, 5),  # of the first use: the second one is made from it
    ):
        built = build_problem(stage.graph, stage.table, costs, context)
        choices = [c for node in built.nodes for c in node.choices]
        found = [c for c in choices if isinstance(c, ParameterChoice) and c.host]
        assert len(found) == num_on_host


def test_pins_are_honoured() -> None:
    stage = stage_of("mlp")
    context = StageContext(pins={"up.weight": "S1"})
    built = build_problem(stage.graph, stage.table, costs_of((2,)), context)
    node = next(n for n in built.nodes if n.name == "parameter_up_weight")
    assert {c.rest for c in node.choices} == {(1,)}  # type: ignore[union-attr]


@pytest.mark.parametrize("pin", ["S5", "P", "S0 R", "", "left"])
def test_a_pin_that_nothing_satisfies_names_what_does(pin: str) -> None:
    stage = stage_of("mlp")
    with pytest.raises(OptionError, match=r"'up.weight'.*'R', 'S0', 'S1'"):
        build_problem(
            stage.graph, stage.table, costs_of((2,)), StageContext(pins={"up.weight": pin})
        )


def test_phases_of_operators() -> None:
    stage = stage_of("mlp")
    built = build_problem(stage.graph, stage.table, costs_of((2,)), StageContext())
    parts = {n.name: p for n, p in zip(built.nodes, built.node_parts, strict=True)}
    for op in stage.graph.operators:
        want = Part.FORWARD if op.phase is Phase.FORWARD else Part.BACKWARD
        assert parts[op.name] is want


def test_nodes_know_their_layers() -> None:
    """A parameter that two layers read is in the first of them."""
    graph = gpt2_graph(4, 32, 2, n_embd=32, n_head=4, n_positions=32, vocab_size=64)
    (stage,) = prepare_stages(graph, Remat.NONE, [0])
    built = build_problem(stage.graph, stage.table, costs_of((2,)), StageContext())
    pairs = zip(built.nodes, built.problem.node_layers, strict=True)
    layers = {(node.kind, node.name): layer for node, layer in pairs}
    made = {op.name: op.layer for op in stage.graph.operators}
    for op in stage.graph.operators:
        assert layers["operator", op.name] == op.layer
    for inp in stage.graph.inputs:
        read_by = [op.layer for op in stage.graph.operators if inp.ref in op.operands]
        assert layers["input", inp.name] == min(read_by, default=0)
    for out in stage.graph.outputs:
        name = out.target or out.kind.value
        assert layers["output", name] == made.get(out.ref.name, 0)
