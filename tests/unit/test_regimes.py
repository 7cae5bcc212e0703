"""Regimes: models and clusters whose best plan every expert knows. The search is told nothing of
them; each plan is made from the captured graph as a user's would be."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.api import plan_model
from autopar.options import SearchOptions
from autopar.plan import ParallelPlan, Remat, StagePlan
from benchmarks.models.moe import MoE, MoEConfig, example_batch
from cost_models import Cluster

CLUSTERS = Path(__file__).parents[1] / "clusters"


class Block(nn.Module):
    """x + down(relu(up(norm(x)))), four times as wide inside."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """Blocks, and the mean of squares."""

    def __init__(self, depth: int, d: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(d) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Words(nn.Module):
    """Embedding, blocks, head, cross-entropy."""

    def __init__(self, depth: int, d: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(depth))
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x), tokens)


@cache
def stack(
    depth: int, d: int, rows: int, cluster: str, budget: float | None = None, **options: Any
) -> ParallelPlan:
    with torch.device("meta"):
        model, batch = Stack(depth, d), torch.empty(rows, d)
    target = Cluster.from_toml(CLUSTERS / cluster) if "toml" in cluster else Cluster.parse(cluster)
    return plan_model(
        model, batch, target, memory_budget=budget, options=SearchOptions(cache=False, **options)
    )[0]


def weights(stage: StagePlan) -> dict[str, tuple[str, str]]:
    """(at rest, in the step) of the matrices."""
    return {n: tuple(p) for n, p in _placements(stage).items() if "norm" not in n}


def _placements(stage: StagePlan) -> dict[str, tuple[str, str]]:
    return {name: (p.rest, p.step) for name, p in stage.parameters.items()}


def matmuls(stage: StagePlan) -> set[str]:
    return {text for name, text in stage.strategies.items() if name.split("_")[0] == "mm"}


def blocks(stage: StagePlan) -> int:
    return stage.last_layer - stage.first_layer + 1


def test_small_model_and_many_rows_is_data_parallel() -> None:
    """A block's gradients are 8 MiB, its activations 128 MiB and more: rows stay where they are.
    `i` are the rows of a matmul, `k` the rows where it makes a weight's gradient."""
    plan = stack(4, 512, 65536, "h100:1x8")
    (stage,) = plan.stages
    assert stage.inputs == {"batch_0": "S0"}
    assert matmuls(stage) == {"i", "k"}
    assert all(step == "R" for _, step in weights(stage).values())


def test_collectives_that_compute_hides_keep_a_pair_of_gpus_data_parallel() -> None:
    """A block's gradients and its activations are 32 MiB each, four times a step: but the gradients
    leave beside compute, so that one stage of one microbatch shards rows and optimizer."""
    plan = stack(2, 1024, 8192, "h100:1x2", microbatch_limit=4)
    (stage,) = plan.stages
    assert plan.num_microbatches == 1 and stage.inputs == {"batch_0": "S0"}
    assert set(weights(stage).values()) == {("S0", "R")}


def test_many_microbatches_shard_at_rest_and_gather_once() -> None:
    """One gather and one reduction a step are spread over the microbatches, and the optimizer works
    on a shard: ZeRO-1 or 2 costs what the all-reduce costs and saves memory and time."""
    (stage,) = stack(4, 2048, 65536, "h100:1x4", num_microbatches=8, num_stages=1).stages
    assert set(weights(stage).values()) == {("S0", "R")}
    assert stage.inputs == {"batch_0": "S0"}


def test_few_rows_and_huge_weights_are_tensor_parallel() -> None:
    """Weights of 1 GiB, activations of 0.5 MiB: Megatron's pair of column and row, gradients never
    move."""
    (stage,) = stack(4, 8192, 16, "h100:1x8").stages
    assert stage.inputs == {"batch_0": "R"}
    assert {n.rsplit("_", 2)[1]: p for n, p in weights(stage).items()} == {
        "up": ("S0", "S0"),
        "down": ("S1", "S1"),
    }


def test_huge_weights_are_tensor_parallel_inside_the_nodes_only() -> None:
    """The axis between the nodes, 460 times slower than the other, never has weights."""
    plan = stack(4, 4096, 512, "slow_network.toml", num_microbatches=1, num_stages=1)
    (stage,) = plan.stages
    assert stage.axis_sizes == (2, 4) and stage.crosses_nodes == (True, False)
    assert all("S" not in rest.split()[0] for rest, _ in weights(stage).values())
    assert all("S" in rest.split()[1] for rest, _ in weights(stage).values())


def test_a_slow_network_is_crossed_by_a_pipeline() -> None:
    """Between the nodes 12 blocks' gradients are 6 GiB, the activations of a cut 128 MiB and those
    overlap with compute: a stage per node, the same number of blocks in each."""
    slow = stack(12, 4096, 4096, "slow_network.toml")
    assert len(slow.stages) >= 2 and slow.num_microbatches > 1
    assert all(not any(stage.crosses_nodes) for stage in slow.stages)
    assert all(len({rank // 4 for rank in stage.devices}) == 1 for stage in slow.stages)
    assert len(stack(12, 4096, 4096, "h100:2x4").stages) == 1  # the same on a fast one


def test_tight_memory_shards_first_and_recomputes_last() -> None:
    """To gather a weight costs less than to compute a layer again. So a falling budget first takes
    parameters at rest, then the activations of some layers, then of more."""

    def at(share: float) -> ParallelPlan:
        free = stack(6, 2048, 16384, "h100:1x4", num_microbatches=1, num_stages=1)
        budget = share * free.stages[0].prediction.peak_bytes
        plan = stack(6, 2048, 16384, "h100:1x4", budget, num_microbatches=1, num_stages=1)
        assert plan.stages[0].prediction.peak_bytes <= budget
        return plan

    plans = [at(share) for share in (1.0, 0.8, 0.7, 0.6)]
    standing = [
        p.parameter_bytes + p.optimizer_bytes for p in (plan.stages[0].prediction for plan in plans)
    ]
    recomputed = [sum(r is not Remat.NONE for r in plan.remat) for plan in plans]
    assert standing[1] < standing[0]
    assert recomputed[0] == recomputed[1] == 0 < recomputed[2] < recomputed[3]
    steps = [plan.step_s for plan in plans]
    assert steps == sorted(steps)


def test_many_experts_are_expert_parallel() -> None:
    """64 experts of 8 M parameters, few rows for each: experts stay, tokens move. Everything else
    is data parallel."""
    config = MoEConfig(1024, 2, 8, 64, 4096, vocab_size=1024, seq_len=512)
    with torch.device("meta"):
        model, batch = MoE(config), example_batch(config, 16)
    options = SearchOptions(num_microbatches=1, num_stages=1, mesh_shape=(8,), cache=False)
    (stage,) = plan_model(model, batch, Cluster.parse("h100:1x8"), options=options)[0].stages
    experts = {n: p for n, p in _placements(stage).items() if n.endswith(("EHF", "EFH"))}
    assert len(experts) == 2 and set(experts.values()) == {("S0", "S0")}
    others = [p for n, p in weights(stage).items() if n not in experts]
    assert all(step == "R" for _, step in others)
    assert set(stage.inputs.values()) == {"S0"}


@pytest.mark.parametrize("vocabulary", [1024, 32768, 131072])
def test_a_large_head_leaves_its_stage_fewer_blocks(vocabulary: int) -> None:
    """The head's matmul is worth d V / 8 d^2 blocks: an eighth, 4 and 16 of the model's 8. Two
    stages share the sum of both evenly, as far as whole blocks go."""
    with torch.device("meta"):
        model, batch = Words(8, 1024, vocabulary), torch.zeros(8192, dtype=torch.long)
    options = SearchOptions(num_microbatches=8, num_stages=2, cache=False)
    first, last = plan_model(model, batch, Cluster.parse("h100:1x2"), options=options)[0].stages
    assert first.first_layer == 0 and last.last_layer == 9  # embedding, 8 blocks, head
    even = max(0.0, (8 - vocabulary / 8192) / 2)
    assert abs(blocks(last) - 1 - even) < 1


def test_two_kinds_of_devices_share_layers_by_speed() -> None:
    """In float32 an H100 is 52.2 / 16.8 = 3.1 times an A100: 9 and 3 of 12 blocks."""
    plan = stack(12, 2048, 65536, "h100:1x2+a100:1x2", num_microbatches=16, num_stages=2)
    by_kind = {min(stage.devices) // 2: blocks(stage) for stage in plan.stages}
    assert by_kind[0] in (8, 9, 10) and sum(by_kind.values()) == 13
