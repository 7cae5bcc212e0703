"""Patterns of pins: names of the whole model, and a graph in which they mean the same."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from autopar.errors import OptionError
from autopar.graph.fold import capture_folded
from autopar.graph.repeat import Folded, whole_graph
from autopar.options import SearchOptions
from autopar.planner import find_plan
from autopar.search.pins import expand_pins
from autopar.search.program import Program
from autopar.search.workload import OneGraph
from cost_models import Cluster


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(16, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@cache
def folded() -> Folded:
    return capture_folded(Stack(), torch.randint(64, (2, 8)))


def test_patterns_name_the_parameters_of_the_whole_model() -> None:
    assert max(folded().copies) > 1
    _, pins = expand_pins(folded(), {"layers.*.up.*": "S0", "head.weight": "S1"})
    blocks = {f"layers.{i}.up.{word}": "S0" for i in range(8) for word in ("weight", "bias")}
    assert pins == {**blocks, "head.weight": "S1"}


def test_names_go_before_patterns_and_earlier_before_later_ones() -> None:
    given = {"layers.*.weight": "S0", "*": "R", "layers.2.up.weight": "S1"}
    _, pins = expand_pins(folded(), given)
    assert [pins[f"layers.{i}.up.weight"] for i in (1, 2)] == ["S0", "S1"]
    assert pins["layers.1.up.bias"] == pins["embed.weight"] == "R"


def test_every_layer_is_written_where_a_block_is_pinned() -> None:
    written, _ = expand_pins(folded(), {"layers.5.up.weight": "S0"})
    assert max(written.copies) == 1
    assert written.graph.fingerprint() == whole_graph(folded()).fingerprint()
    same, _ = expand_pins(folded(), {"embed.weight": "S0"})
    assert same is folded()
    assert expand_pins(folded(), {}) == (folded(), {})


def test_layers_that_are_pinned_alike_are_of_one_class() -> None:
    free = Program(folded(), 1)
    written, pins = expand_pins(folded(), {"layers.*.up.weight": "S0"})
    assert len(Program(written, 1, pins).classes) == len(free.classes)
    written, pins = expand_pins(folded(), {"layers.3.up.weight": "S0"})
    assert len(Program(written, 1, pins).classes) == len(free.classes) + 1


def test_a_pattern_that_matches_nothing_is_an_error_with_close_names() -> None:
    with pytest.raises(OptionError, match=r"layers\.0\.up\.weight"):
        expand_pins(folded(), {"layers.0.upp.weight": "S0"})
    with pytest.raises(OptionError, match="did you mean"):
        expand_pins(folded(), {"blocks.*": "S0"})


def test_a_plan_honours_them_in_every_block() -> None:
    options = SearchOptions(
        placements={"layers.*.up.weight": "S0", "layers.4.up.weight": "S1"},
        mesh_shape=(2,),
        cache=False,
    )
    plan = find_plan(OneGraph(folded(), 1), Cluster.parse("h100:1x2"), options=options)
    rest = {k: v.rest for k, v in plan.stages[0].parameters.items() if k.endswith("up_weight")}
    assert rest.pop("parameter_layers_4_up_weight") == "S1"
    assert list(rest.values()) == ["S0"] * 7
