"""Folded stages: how they are written, and that what is written out again runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autopar.api import plan_model
from autopar.graph.fold import capture_folded
from autopar.graph.repeat import Folded
from autopar.intraop.split import Split
from autopar.options import SearchOptions
from autopar.plan import Remat
from autopar.search import exact, thorough
from autopar.search.program import Program
from autopar.search.window import Window, write_window
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


@cache
def captured() -> Folded:
    return capture_folded(*deep())


def test_long_runs_are_written_twice() -> None:
    folded = captured()
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


def test_a_break_splits_a_fold() -> None:
    """Those before it and behind it are folded each for themselves, or explicit where few."""
    folded = captured()
    program = Program(folded, 1)
    layers = folded.num_layers
    policies = (Remat.NONE,) * layers
    whole = write_window(folded, program.kind_of_written, (0,), policies)
    (fold,) = whole.folds(0)
    for count in (1, 3, 4):
        layer = whole.break_of(0, Split(0, count))
        split = write_window(folded, program.kind_of_written, (0,), policies, breaks={layer})
        parts = [part for part in (count, fold.count - count) if part > 2]
        assert [f.count for f in split.folds(0)] == parts
        written = [split.written_layer(k) for k in range(layers)]
        assert written == sorted(written)
        assert set(written) == set(range(len(split.graph.layer_names)))
        assert split.written_layer(layer) > split.written_layer(layer - 1)


def test_a_split_plan_trains_as_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget that lets the first of its equal layers take more bytes than the others."""
    windows: list[Window] = []

    def written(*arguments: Any, **options: Any) -> Window:
        windows.append(write_window(*arguments, **options))
        return windows[-1]

    monkeypatch.setattr(exact, "write_window", written)
    monkeypatch.setattr(thorough, "_SMALL", 0)  # as in a search of large models
    model, batch = deep()
    options = SearchOptions(
        cache=False,
        num_stages=1,
        mesh_shape=(2, 2),
        num_microbatches=2,
        remat=Remat.NONE,
        compiled=False,
        target_gap=1e-4,
    )
    plan, _ = plan_model(model, batch, FAST, memory_budget=1_989_000, options=options)
    assert [[fold.count for fold in window.folds(0)] for window in windows] == [[7], [4, 3]]
    placed = plan.stages[0].parameters
    inner = [placed[f"parameter_transformer_h_{block}_attn_c_attn_weight"] for block in range(1, 8)]
    assert len(set(inner[:4])) == len(set(inner[4:])) == 1 and inner[0] != inner[-1]
    assert verify_plan(model, batch, plan).ok


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
