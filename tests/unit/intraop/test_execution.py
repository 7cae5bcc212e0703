"""What is one compiled step, and what that hides."""

from __future__ import annotations

from dataclasses import replace

from autopar.estimate import EXPOSED_SHARE, MeshCosts
from autopar.graph.program import OutputKind
from autopar.intraop.execution import Execution, execution_of, exposed_share, gradient_casts
from autopar.intraop.stage_problem import StageContext
from autopar.mesh import LogicalMesh
from cost_models import Cluster
from tests.unit.intraop.stages import image_graph, stage_of


def test_a_collective_of_a_parameter_is_hidden_in_a_compiled_step_alone() -> None:
    """One stage, one microbatch, nothing on the host, no rows exchanged."""
    graph, mesh, step = stage_of("mlp").graph, LogicalMesh((2,)), StageContext(compiled=True)
    assert execution_of(graph, step) is Execution.STEP
    for text, share in (("h100:1x2", EXPOSED_SHARE), ("h100:1x4", 1.0)):
        assert exposed_share(graph, MeshCosts(Cluster.parse(text), mesh), step) == share
    costs = MeshCosts(Cluster.parse("h100:1x2"), mesh)
    for other in (
        replace(step, num_microbatches=2),
        replace(step, compiled=False),
        replace(step, offload=True),
    ):
        assert exposed_share(graph, costs, other) == 1.0
        assert execution_of(graph, other) is not Execution.STEP


def test_which_casts_of_gradients_are_not_made() -> None:
    """Of weights of convolutions, unless gradients are added up; products leave in the wide
    type."""
    graph = image_graph()
    paths = {i.name: i.target for i in graph.inputs}
    whose = {o.ref.name: paths[o.target] for o in graph.outputs_of(OutputKind.GRADIENT)}
    found = {execution: gradient_casts(graph, execution) for execution in Execution}
    assert {whose[name] for name in found[Execution.STEP].left} == {"one.weight", "two.weight"}
    assert not found[Execution.PROGRAMS].left
    (product,) = found[Execution.PROGRAMS].wide
    assert found[Execution.STEP].wide == {product}
    makers = {op.name: op for op in graph.operators}
    (head,) = [name for name, path in whose.items() if path == "head.weight"]
    view = makers[head].operands[0].name
    assert product in {view, *(ref.name for ref in makers[view].operands)}
    assert not any(found[Execution.OPERATORS])
