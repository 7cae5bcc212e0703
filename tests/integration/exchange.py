"""What each process of the exchange test runs: one call of the experts, forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.graph.program import Operator, Phase, Ref, TensorMeta
from autopar.layout import raw_dims
from autopar.lowering.program import Port
from autopar.lowering.spmd import lower_program
from autopar.mesh import LogicalMesh
from autopar.runtime.collectives import ProcessCollectives
from autopar.runtime.comm import World
from autopar.runtime.inputs import local_part
from autopar.runtime.interpreter import run_program
from autopar.sharding.registry import make_call, rule_for
from autopar.sharding.strategy import strategies

NUM = 4
TARGETS = (torch.ops.autopar.experts.default, torch.ops.autopar.experts_backward.default)


def arguments(target: object) -> tuple[Tensor, ...]:
    """Rank 0 has the experts 0 and 1, which nobody of the second half chooses; no token chooses
    expert 3."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dout, x, weight = draw(8, 6), draw(8, 6), draw(8, 2)
    index = torch.tensor([[0, 1], [1, 0], [0, 2], [1, 2], [2, 2], [2, 2], [2, 2], [2, 2]])
    tensors = (x, index, weight, draw(NUM, 2, 4, 6), draw(NUM, 6, 4))
    return tensors if target is TARGETS[0] else (dout, *tensors)


def run(world: World) -> list[list[Tensor]]:
    """Results of this rank, tokens and experts sharded, for each target."""
    mesh = LogicalMesh((world.size,))
    found = []
    for target in TARGETS:
        tensors = arguments(target)
        metas = {Ref(f"x{i}"): TensorMeta(tuple(t.shape), t.dtype) for i, t in enumerate(tensors)}
        whole = target(*tensors, "silu", 0, NUM)
        results = whole if isinstance(whole, tuple) else (whole,)
        result_metas = tuple(TensorMeta(tuple(t.shape), t.dtype) for t in results)
        args = (*metas, "silu", 0, NUM)
        op = Operator("op", target, args, {}, result_metas, Phase.FORWARD)
        dims = {ref: raw_dims(meta.shape) for ref, meta in metas.items()}
        call = make_call(op, dims, metas, set())
        rule = rule_for(call)
        (x,) = [s for s in strategies(rule, call.operands, mesh.axis_sizes) if s.text == "x"]
        ports = {
            ref.name: Port(ref, metas[ref], dims[ref], layout)
            for ref, layout in zip(metas, x.operands, strict=True)
        }
        outputs = {
            str(i): (Ref("op", i), meta, x.results[i]) for i, meta in enumerate(result_metas)
        }
        program = lower_program(
            [op],
            inputs=ports,
            outputs=outputs,
            strategies={"op": x},
            calls={"op": call},
            rules={"op": rule},
            dims={Ref("op", i): raw_dims(meta.shape) for i, meta in enumerate(result_metas)},
            mesh=mesh.axis_sizes,
            verify=True,
        )
        shards = {
            name: [local_part(t, port.dims, port.layout, mesh, (world.rank,)).clone()]
            for (name, port), t in zip(ports.items(), tensors, strict=True)
        }
        group = dist.group.WORLD
        assert group is not None
        got = run_program(
            program,
            shards,
            coordinates=[(world.rank,)],
            collectives=ProcessCollectives([(group.group_name, mesh.axis_sizes[0])]),
            device=torch.device("cpu"),
        )
        found.append([got[str(i)][0] for i in range(len(results))])
    return found
