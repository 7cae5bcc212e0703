"""What is one compiled step, and what that hides."""

from __future__ import annotations

from dataclasses import replace

from autopar.estimate import EXPOSED_SHARE, MeshCosts
from autopar.graph.program import OutputKind
from autopar.intraop.execution import Execution, execution_of, exposed_share, left_as_made
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


def test_gradients_of_convolutions_are_left_as_they_are_made() -> None:
    """Those of other weights are widened; so are all where gradients are added up."""
    graph = image_graph()
    left = left_as_made(graph, Execution.STEP)
    gradients = {o.ref.name: o.target for o in graph.outputs_of(OutputKind.GRADIENT)}
    paths = {i.name: i.target for i in graph.inputs}
    assert {paths[gradients[name]] for name in left} == {"one.weight", "two.weight"}
    assert not left_as_made(graph, Execution.PROGRAMS)
    assert not left_as_made(graph, Execution.OPERATORS)
