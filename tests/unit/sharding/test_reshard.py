"""Resharding: emitted programs take random data from layout to layout, by exactly the steps
priced."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from autopar.graph.program import Ref, TensorMeta
from autopar.layout import PARTIAL, Dims, Layout, layout_text, parse_layout, shape_of
from autopar.lowering.emitter import Emitter
from autopar.lowering.program import Communicate, LocalProgram, Port, check_program
from autopar.mesh import LogicalMesh
from autopar.runtime.interpreter import run_program
from autopar.runtime.virtual import VirtualCollectives, shard, unshard
from autopar.sharding.reshard import StepKind, reshard_steps
from autopar.sharding.strategy import layouts

ONE, TWO, THREE = ((8,),), ((8,), (4,)), ((8, 4), (2,))
UNEVEN = ((5,), (), (3, 4))
MESHES = {
    "2": LogicalMesh((2,)),
    "4": LogicalMesh((4,)),
    "2x2": LogicalMesh((2, 2)),
    "2x4": LogicalMesh((2, 4)),
    "3x2": LogicalMesh((3, 2)),
}
FREE = (StepKind.SLICE, StepKind.TO_PARTIAL)


def _program(dims: Dims, source: Layout, target: Layout, mesh: LogicalMesh) -> LocalProgram:
    meta = TensorMeta(shape_of(dims), torch.float64)
    emit = Emitter(mesh.axis_sizes)
    emit.define(Ref("x"), dims, source, Ref("local"))
    port = Port(emit.get(Ref("x"), target), meta, dims, target)
    inputs = {"x": Port(Ref("local"), meta, dims, source)}
    return check_program(LocalProgram(inputs, tuple(emit.body), {"y": port}, {}))


def _check(dims: Dims, source: Layout, target: Layout, mesh: LogicalMesh) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 9, shape_of(dims), generator=generator).double()
    program = _program(dims, source, target, mesh)
    shards = shard(whole, dims, source, mesh, generator)
    got = run_program(
        program,
        {"x": shards},
        coordinates=[mesh.coordinates(r) for r in range(mesh.num_devices)],
        collectives=VirtualCollectives(mesh),
        device=torch.device("cpu"),
    )
    name = f"{layout_text(dims, source)} -> {layout_text(dims, target)} on {mesh}"
    assert torch.equal(unshard(got["y"], dims, target, mesh), whole), name
    steps = reshard_steps(source, target)
    emitted = Counter((str(i.op), i.axis) for i in program.body if isinstance(i, Communicate))
    assert emitted == Counter((str(s.kind), s.axis) for s in steps if s.kind not in FREE), name


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("dims", [ONE, TWO, THREE, UNEVEN], ids=["one", "two", "three", "uneven"])
def test_every_pair_of_layouts(dims: Dims, mesh: LogicalMesh) -> None:
    choices = layouts(dims, mesh.axis_sizes, partial=True)
    for source in choices:
        for target in choices:
            _check(dims, source, target, mesh)


def test_pairs_of_layouts_on_three_axes() -> None:
    """A sample of the pairs: all of them are thousands."""
    mesh = LogicalMesh((2, 2, 2))
    choices = layouts(TWO, mesh.axis_sizes, partial=True)
    generator = torch.Generator().manual_seed(1)
    for pick in torch.randint(len(choices), (400, 2), generator=generator).tolist():
        _check(TWO, choices[pick[0]], choices[pick[1]], mesh)


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        ("P", "S0", "reduce_scatter:0"),
        ("P", "R", "all_reduce:0"),
        ("R", "P", "to_partial:0"),
        ("R", "S1", "slice:0"),
        ("S0", "R", "all_gather:0"),
        ("S0", "S1", "all_to_all:0"),
        ("S0", "P", "all_gather:0 to_partial:0"),
        ("S0 S0", "R R", "all_gather:1 all_gather:0"),
        ("R R", "S0 S0", "slice:0 slice:1"),
        ("S0 P", "S0 S0", "reduce_scatter:1"),
        ("P S0", "S0 S0", "all_reduce:0 all_gather:1 slice:0 slice:1"),
        ("P P", "S0 S0", "reduce_scatter:0 reduce_scatter:1"),
        ("P P", "S0 S1", "reduce_scatter:0 reduce_scatter:1"),
        ("S0 S0", "S0 S1", "all_gather:1 slice:1"),
        ("S0 S1", "S1 S0", "all_gather:1 all_gather:0 slice:0 slice:1"),
        ("S0 R", "S1 R", "all_to_all:0"),
        ("S0 P", "S1 P", "all_to_all:0"),
        ("S0 R", "S0 P", "to_partial:1"),
    ],
)
def test_golden_steps(source: str, target: str, steps: str) -> None:
    found = reshard_steps(parse_layout(source, TWO), parse_layout(target, TWO))
    assert " ".join(f"{s.kind}:{s.axis}" for s in found) == steps


def test_the_same_layout_costs_nothing() -> None:
    assert reshard_steps((0, PARTIAL), (0, PARTIAL)) == ()
