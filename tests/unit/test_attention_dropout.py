"""A GPT with dropout inside its attention takes the same step under every plan."""

from __future__ import annotations

import random

import pytest
import torch

from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.plan import Remat
from autopar.verify import verify_plan
from benchmarks.models.gpt import GPT, GPTConfig, example_batch
from tests.plans import random_plan, with_strategy

ROWS, MICROBATCHES = 8, 2


@pytest.mark.parametrize(
    ("meshes", "strategy", "remat"),
    [
        ([(2,)], "b", Remat.NONE),
        ([(4,)], "h", Remat.FULL),
        ([(5,)], "s", Remat.NONE),  # three of the twelve queries on four devices, none on one
        ([(2, 2)], "h s", Remat.NONE),
        ([(2, 2)], "s b", Remat.FULL),
        ([(2,), (4,)], "", Remat.FULL),
    ],
)
def test_steps_agree(meshes: list[tuple[int, ...]], strategy: str, remat: Remat) -> None:
    torch.manual_seed(0)
    config = GPTConfig(32, len(meshes), 4, vocab_size=64, seq_len=12, dropout=0.2)
    model, batch = GPT(config), example_batch(config, ROWS)
    graph = cluster_layers(capture_graph(model, example_batch(config, ROWS // MICROBATCHES)))
    plan = random_plan(graph, meshes, random.Random(0), remat=remat, num_microbatches=MICROBATCHES)
    if strategy:
        plan = with_strategy(plan, "sdpa_dropout", strategy)
    report = verify_plan(model, batch, plan, dtype="float64")
    assert report.dropout and report.ok, report
