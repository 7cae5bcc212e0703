"""Hubs: one place to reshard a value for all its readers, and one for what is kept."""

from __future__ import annotations

import pytest
import torch

from autopar.graph.execute import run_graph
from autopar.graph.hubs import insert_hubs, is_hub, is_save
from autopar.graph.program import Graph, InputKind, Phase
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import cut_stages
from autopar.plan import Remat
from tests.unit.lowering.test_recompute import case_of, values_of
from tests.zoo import CORE


def check_hubs(graph: Graph) -> None:
    phase = {op.name: op.phase for op in graph.operators}
    saves = {op.name for op in graph.operators if is_save(op)}
    inputs = {i.name: i for i in graph.inputs}
    readers = graph.readers()
    sent = {out.ref for out in graph.outputs}
    for op in graph.operators:
        if is_hub(op):
            assert op.results[0] == graph.metas()[op.operands[0]]
            continue
        for ref in op.operands:
            if op.phase is Phase.BACKWARD and phase.get(ref.name) is Phase.FORWARD:
                assert ref.name in saves, f"{op.name} reads {ref}, which is not saved"
            if op.phase is Phase.BACKWARD and ref.name in inputs:
                kind, made = inputs[ref.name].kind, inputs[ref.name].phase
                assert kind is not InputKind.RECEIVED or made is Phase.BACKWARD
    hubs = {op.name for op in graph.operators if is_hub(op)}
    for ref, found in readers.items():
        kinds = {i.kind for i in graph.inputs if i.ref == ref}
        if ref.name in hubs or kinds & {InputKind.SEED, InputKind.TANGENT}:
            continue
        for where in Phase:
            mine = [op for op in found if op.phase is where and not is_save(op)]
            count = len(mine) + (ref in sent and phase.get(ref.name) is where)
            assert count <= 1, f"{ref} has {count} readers in {where} and no hub"


@pytest.mark.parametrize("name", CORE)
def test_invariants_and_values(name: str) -> None:
    case = case_of(name)
    graph = apply_recompute(case.graph, Remat.SELECTIVE)
    hubbed = insert_hubs(graph)
    check_hubs(hubbed)
    assert [op.name for op in hubbed.operators if not is_hub(op)] == [
        op.name for op in graph.operators
    ]
    values = values_of(case)
    for a, b in zip(run_graph(hubbed, values), run_graph(graph, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)  # convolutions may round apart


@pytest.mark.parametrize("name", ["t5", "unet", "gpt2"])
def test_stage_graphs_too(name: str) -> None:
    graph = apply_recompute(case_of(name).graph, Remat.FULL)
    middle = len(graph.layer_names) // 2
    for stage in cut_stages(graph, [0, middle]):
        check_hubs(insert_hubs(stage))
