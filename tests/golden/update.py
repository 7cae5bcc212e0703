"""Plans whose text is reviewed by people. `python -m tests.golden.update` writes the texts anew.

Placements are "at rest > held through the step"; strategies name the factor of each mesh axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat
from autopar.planner import make_plan
from cost_models import Cluster

FOLDER = Path(__file__).parent
_GIB = 2.0**30


class Mlp(nn.Module):
    """Mean of squares of down(relu(up(x))), no biases: up [f, d], down [d, f]."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).square().mean()


class Block(nn.Module):
    """A transformer block, pre-norm, with a mean of squares on top."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        parts = self.qkv(self.ln_1(x)).split(d, dim=2)
        shape = (batch, length, self.heads, d // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).reshape(batch, length, d))
        x = x + self.down(nn.functional.gelu(self.up(self.ln_2(x))))
        return x.square().mean()


@dataclass(frozen=True)
class Case:
    """budget_gib: None for the device's own."""

    build: Callable[[], tuple[nn.Module, Tensor]]
    cluster: str = "h100:1x2"
    num_microbatches: int = 1
    budget_gib: float | None = None
    mesh_shape: tuple[int, ...] | None = None


def mlp(d: int, f: int, rows: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (Mlp(d, f), torch.empty(rows, d))


CASES = {
    # few rows, huge weights: moving activations is cheaper than moving gradients
    "mlp_tensor_parallel": Case(mlp(8192, 32768, 16)),
    # many rows, small weights: the other way round
    "mlp_data_parallel": Case(mlp(512, 2048, 65536)),
    # gradients summed over 16 microbatches, then reduced once: weights gathered once per step
    "mlp_zero": Case(mlp(4096, 16384, 8192), num_microbatches=16),
    # the same within 2.25 GiB: weights and gradients stay sharded
    "mlp_tight_budget": Case(mlp(4096, 16384, 8192), num_microbatches=16, budget_gib=2.25),
    "block_2x4": Case(
        lambda: (Block(2048, 16), torch.empty(16, 1024, 2048)), "h100:2x4", mesh_shape=(2, 4)
    ),
}


def plan_of(case: Case) -> ParallelPlan:
    with torch.device("meta"):
        model, x = case.build()
    graph = cluster_layers(capture_graph(model, (x,)), 1)
    budget = None if case.budget_gib is None else case.budget_gib * _GIB
    return make_plan(
        graph,
        Cluster.parse(case.cluster),
        num_microbatches=case.num_microbatches,
        budget_bytes=budget,
        options=SearchOptions(
            num_stages=1, mesh_shape=case.mesh_shape, remat=Remat.NONE, cache=False
        ),
    )


def show(plan: ParallelPlan) -> str:
    """Placements, strategies, milliseconds and GiB of a plan of one stage."""
    (stage,) = plan.stages
    p = stage.prediction
    sizes = "x".join(map(str, stage.axis_sizes))
    lines = [
        f"{plan.cluster_text}, mesh {sizes}, {plan.num_microbatches} microbatch(es)",
        f"step {plan.step_s * 1e3:.2f} ms: forward {p.forward_s * 1e3:.2f}, backward "
        f"{p.backward_s * 1e3:.2f}, once {p.step_s * 1e3:.2f}",
        f"peak {p.peak_bytes / _GIB:.3f} GiB: parameters {p.parameter_bytes / _GIB:.3f}, gradients "
        f"{p.gradient_bytes / _GIB:.3f}, optimizer {p.optimizer_bytes / _GIB:.3f}, saved "
        f"{p.saved_bytes / _GIB:.3f}, transient {p.transient_bytes / _GIB:.3f}",
        "",
    ]
    for name, placement in stage.parameters.items():
        accumulated = stage.outputs.get(name, "-")
        lines.append(f"{name:24} {placement.rest} > {placement.step}, gradient {accumulated}")
    lines += [f"{name:24} {layout}" for name, layout in stage.inputs.items()]
    lines.append("")
    lines += [f"{name:24} {text}" for name, text in stage.strategies.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    for name, case in CASES.items():
        (FOLDER / f"{name}.txt").write_text(show(plan_of(case)), encoding="utf-8")


if __name__ == "__main__":
    main()
