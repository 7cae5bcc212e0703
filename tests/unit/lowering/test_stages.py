"""The stage cut: at every boundary of every model, values and gradients survive the cut."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import InternalError
from autopar.graph.execute import run_operator
from autopar.graph.program import Graph, InputKind, OutputKind, Phase
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import (
    check_cut,
    cut_stages,
    parameter_owners,
    parameter_sources,
    stage_graph,
)
from autopar.plan import Remat
from tests.unit.lowering.test_recompute import case_of, values_of
from tests.zoo import CORE


def play(stages: tuple[Graph, ...], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Forward of all stages in order, then backward in reverse; values go by name."""
    outputs: dict[str, torch.Tensor] = {}
    mail: dict[str, torch.Tensor] = {}
    known = [
        {i.ref: values[i.name] for i in s.inputs if i.kind is not InputKind.RECEIVED}
        for s in stages
    ]
    order = [(Phase.FORWARD, i) for i in range(len(stages))]
    order += [(Phase.BACKWARD, i) for i in reversed(range(len(stages)))]
    for phase, index in order:
        stage, mine = stages[index], known[index]
        for inp in stage.inputs_of(InputKind.RECEIVED):
            if inp.phase is phase:
                mine[inp.ref] = mail[inp.target]
        for op in stage.operators:
            if op.phase is phase:
                results = run_operator(op, mine, torch.device("cpu"))
                mine.update((ref, results[ref.index]) for ref in op.refs)
        for out in stage.outputs:
            if out.ref in mine:
                target = mail if out.kind is OutputKind.SENT else outputs
                target[
                    f"{out.target}" if out.kind is OutputKind.SENT else f"{out.kind} {out.target}"
                ] = mine[out.ref]
    return outputs


@pytest.mark.parametrize("name", CORE)
def test_every_boundary(name: str) -> None:
    case = case_of(name)
    graph = apply_recompute(case.graph, Remat.SELECTIVE)
    for first in range(1, len(graph.layer_names)):
        stages = cut_stages(graph, [0, first])
        assert [s.operators for s in stages] == [
            stage_graph(graph, *ends).operators
            for ends in ((0, first - 1), (first, len(graph.layer_names) - 1))
        ]
        owners = parameter_owners(stages)
        assert set(owners) == {i.owner for i in graph.inputs_of(InputKind.PARAMETER)}
    with torch.no_grad():
        whole = play((graph,), values_of(case))
        pieces = play(cut_stages(graph, range(len(graph.layer_names))), values_of(case))
    assert whole.keys() == pieces.keys()
    assert all(pieces[key].equal(value) for key, value in whole.items())


def test_skip_edges_go_straight_to_their_readers() -> None:
    graph = case_of("unet").graph
    stages = cut_stages(graph, range(len(graph.layer_names)))
    sender = {o.target: i for i, s in enumerate(stages) for o in s.outputs_of(OutputKind.SENT)}
    spans = [
        index - sender[inp.target]
        for index, stage in enumerate(stages)
        for inp in stage.inputs_of(InputKind.RECEIVED)
        if inp.phase is Phase.FORWARD
    ]
    assert max(spans) > 1


def test_tied_weights_have_one_owner_and_one_source() -> None:
    graph = case_of("gpt2").graph
    stages = cut_stages(graph, [0, len(graph.layer_names) - 1])
    tied = "transformer.wte.weight"
    assert parameter_owners(stages)[tied] == 0
    assert all(tied in parameter_sources(stage) for stage in stages)
    (whole,) = cut_stages(graph, [0])
    uses = [i.name for i in whole.inputs_of(InputKind.PARAMETER) if i.owner == tied]
    assert len(uses) == 2 and parameter_sources(whole)[tied] == uses[0]


@pytest.mark.parametrize("first", [(), (1,), (0, 0), (0, 2, 1)])
def test_stages_start_in_order(first: tuple[int, ...]) -> None:
    with pytest.raises(InternalError, match="increasing"):
        cut_stages(case_of("gpt2").graph, first)


def test_the_verifier_sees_a_lost_stage() -> None:
    graph = case_of("gpt2").graph
    stages = cut_stages(graph, [0, 2])
    with pytest.raises(InternalError, match="partition"):
        check_cut(graph, stages[:1])
    with pytest.raises(InternalError, match="receives"):
        check_cut(graph, stages[::-1])
