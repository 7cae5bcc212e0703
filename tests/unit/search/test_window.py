"""Folded stages: how they are written, and that what is written out again runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from autopar.api import plan_model
from autopar.graph.fold import capture_folded
from autopar.options import SearchOptions
from autopar.plan import Remat
from autopar.search.program import Program
from autopar.search.window import write_window
from autopar.verify import verify_plan
from cost_models import Cluster

FAST = Cluster.from_toml(Path(__file__).parents[2] / "clusters" / "fast_links.toml")
BLOCKS = 9


def deep() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(
        n_layer=BLOCKS, n_embd=32, n_head=4, n_positions=16, vocab_size=64, use_cache=False
    )
    torch.manual_seed(0)
    ids = torch.randint(64, (8, 16))
    model = transformers.GPT2LMHeadModel(config).train().double()
    return model, {"input_ids": ids, "labels": ids}


def test_long_runs_are_written_twice() -> None:
    folded = capture_folded(*deep())
    program = Program(folded, 1)
    none, full = Remat.NONE, Remat.FULL
    layers = folded.num_layers
    cut = write_window(
        folded, program.kind_of_written, (0, 5), (full,) * 3 + (none,) * (layers - 3)
    )
    covered = [(p.first, p.count) for stage in cut.pieces for p in stage]
    assert sum(count for _, count in covered) == layers
    assert [first for first, _ in covered] == sorted(first for first, _ in covered)
    one = write_window(folded, program.kind_of_written, (0,), (none,) * layers)
    (fold,) = one.folds(0)
    assert len(one.graph.layer_names) < layers and fold.count > 2
    assert [one.written_layer(k) for k in range(layers)] == sorted(
        one.written_layer(k) for k in range(layers)
    )
    whole = write_window(folded, program.kind_of_written, (0,), (none,) * layers, fold=False)
    assert len(whole.graph.layer_names) == layers and not whole.folds(0)


@pytest.mark.parametrize(
    "pins",
    [
        {"num_stages": 1, "mesh_shape": (2, 2), "remat": Remat.SELECTIVE},
        {"num_stages": 2, "mesh_shape": (2,), "num_microbatches": 2},
    ],
    ids=str,
)
def test_a_folded_plan_trains_as_one_device(pins: dict[str, object]) -> None:
    model, batch = deep()
    plan, graph = plan_model(model, batch, FAST, options=SearchOptions(cache=False, **pins))
    assert len(plan.layer_names) == BLOCKS + 2 == len(graph.layer_names)
    assert verify_plan(model, batch, plan).ok
