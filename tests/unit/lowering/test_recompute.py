"""Save or recompute: the same values, fewer bytes, the cheapest cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from autopar.graph.execute import run_graph
from autopar.graph.inline import inlined
from autopar.graph.program import Graph, GraphInput, InputKind, Operator, Phase, Ref, TensorMeta
from autopar.intraop.build import build_problem
from autopar.intraop.stage_problem import StageContext
from autopar.lowering.lower import prepare_stages
from autopar.lowering.recompute import apply_recompute, may_recompute
from autopar.plan import Remat
from tests.unit.intraop.stages import costs_of
from tests.unit.runtime.reference import Case, zoo_case
from tests.zoo import CORE

torch.set_num_threads(1)
aten = torch.ops.aten


@cache
def case_of(name: str) -> Case:
    return zoo_case(name, num_microbatches=1)


def values_of(case: Case) -> dict[str, torch.Tensor]:
    leaves = iter(case.leaves)
    values: dict[str, torch.Tensor] = {}
    for inp in case.graph.inputs:
        match inp.kind:
            case InputKind.PARAMETER:
                values[inp.name] = case.parameters[inp.owner]
            case InputKind.BUFFER:
                values[inp.name] = case.buffers[inp.target]
            case InputKind.BATCH:
                values[inp.name] = next(leaves)
            case InputKind.CONSTANT:
                values[inp.name] = case.graph.constants[inp.name]
            case InputKind.TANGENT:
                values[inp.name] = torch.ones(inp.meta.shape, dtype=inp.meta.dtype)
            case _:
                values[inp.name] = torch.tensor([7, 0], dtype=torch.int32)
    return values


def saved_values(graph: Graph) -> set[Ref]:
    """Forward values that backward reads."""
    forward = {ref for op in graph.operators if op.phase is Phase.FORWARD for ref in op.refs}
    read = {r for op in graph.operators if op.phase is Phase.BACKWARD for r in op.operands}
    return forward & read


def saved_bytes(graph: Graph) -> int:
    metas = graph.metas()
    return sum(metas[ref].nbytes for ref in saved_values(graph))


@pytest.mark.parametrize("name", CORE)
def test_values_stay_and_saved_bytes_fall(name: str) -> None:
    case = case_of(name)
    values = values_of(case)
    want = run_graph(case.graph, values)
    bytes_by_policy = []
    for policy in (Remat.NONE, Remat.SELECTIVE, Remat.FULL):
        graph = apply_recompute(case.graph, policy)
        bytes_by_policy.append(saved_bytes(graph))
        for a, b in zip(run_graph(graph, values), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        check_copies(graph, policy)
    none, selective, full = bytes_by_policy
    assert none >= selective >= full
    assert none <= saved_bytes(case.graph)


@pytest.mark.parametrize("policy", Remat)
def test_compiled_programs_hold_less_under_any_policy(policy: Remat) -> None:
    case = case_of("llama")
    values = values_of(case)
    plain = apply_recompute(case.graph, policy)
    graph = apply_recompute(case.graph, policy, compiled=True)
    for a, b in zip(run_graph(graph, values), run_graph(case.graph, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    fewer = saved_bytes(graph) < saved_bytes(plain)
    assert fewer if policy is Remat.NONE else saved_bytes(graph) <= saved_bytes(plain)
    free = inlined(case.graph)
    for op in graph.operators:
        assert op.inlined is (op.recompute and op.forward in free)
        if op.recompute and not op.inlined:
            assert may_recompute(op, policy)
    assert not any(op.inlined for op in plain.operators)


def test_what_is_inlined_costs_nothing() -> None:
    stage = prepare_stages(case_of("llama").graph, Remat.NONE, [0], compiled=True)[0]
    built = build_problem(stage.graph, stage.table, costs_of((2,)), StageContext(compiled=True))
    free = {op.name for op in stage.graph.operators if op.inlined}
    seconds = zip(built.nodes, built.problem.node_seconds, strict=True)
    spent = {node.name: float(s.max()) for node, s in seconds if node.name in free}
    assert len(spent) == len(free) > 0 and not any(spent.values())


def check_copies(graph: Graph, policy: Remat) -> None:
    """Copies run in backward, are read there, and only what the policy allows is copied."""
    made = {op.name: op for op in graph.operators}
    readers = graph.readers()
    for op in graph.operators:
        if op.recompute:
            assert op.phase is Phase.BACKWARD
            assert made[op.forward].phase is Phase.FORWARD and made[op.forward].target is op.target
            assert may_recompute(made[op.forward], policy)
            assert any(readers.get(ref) for ref in op.refs), f"{op.name} is made for nobody"


def random_graph(seed: int) -> Graph:
    """Forward: a few pointwise operators and matmuls in one layer. Backward reads some values."""
    rng = random.Random(seed)
    sizes = [rng.choice((2, 4, 8)) for _ in range(9)]
    x = GraphInput("x", InputKind.PARAMETER, TensorMeta((2, 2), torch.float32), "x", "x")
    known = [x.ref]
    ops: list[Operator] = []
    for i in range(rng.randint(4, 7)):
        meta = TensorMeta((sizes[i], 2), torch.float32)
        target = rng.choice((aten.add.Tensor, aten.mul.Tensor, aten.mm.default))
        args = (rng.choice(known), rng.choice(known))
        ops.append(Operator(f"f{i}", target, args, {}, (meta,), Phase.FORWARD, layer=0))
        known.append(Ref(f"f{i}"))
    for i in range(2):
        args = (rng.choice(known[1:]), rng.choice(known[1:]))
        meta = TensorMeta((1,), torch.float32)
        ops.append(Operator(f"b{i}", aten.add.Tensor, args, {}, (meta,), Phase.BACKWARD, layer=0))
    return Graph((x,), tuple(ops), (), layer_names=("only",))


def remakable(graph: Graph, kept: Sequence[Ref], wanted: set[Ref]) -> bool:
    """Whether backward can have every wanted value from the kept ones and the input."""
    available = {Ref("x"), *kept}
    for op in graph.operators:
        allowed = op.phase is Phase.FORWARD and may_recompute(op, Remat.SELECTIVE)
        if allowed and all(ref in available for ref in op.operands):
            available.update(op.refs)
    return wanted <= available


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_is_the_cheapest(seed: int) -> None:
    graph = random_graph(seed)
    metas, wanted = graph.metas(), saved_values(graph)
    forward = [ref for op in graph.operators if op.phase is Phase.FORWARD for ref in op.refs]
    best = min(
        sum(metas[ref].nbytes for ref in kept)
        for n in range(len(forward) + 1)
        for kept in itertools.combinations(forward, n)
        if remakable(graph, kept, wanted)
    )
    assert saved_bytes(apply_recompute(graph, Remat.SELECTIVE)) == best


def test_policies() -> None:
    graph = random_graph(0)
    mm = Operator("m", aten.mm.default, (Ref("x"), Ref("x")), {}, graph.operators[0].results,
                  Phase.FORWARD)  # fmt: skip
    add = Operator("a", aten.add.Tensor, (Ref("x"), Ref("x")), {}, (), Phase.FORWARD)
    view = Operator("v", aten.view.default, (Ref("x"), [4]), {}, (), Phase.FORWARD)
    order = (Remat.NONE, Remat.SELECTIVE, Remat.FULL)
    assert [may_recompute(mm, p) for p in order] == [False, False, True]
    assert [may_recompute(add, p) for p in order] == [False, True, True]
    assert [may_recompute(view, p) for p in order] == [True, True, True]
