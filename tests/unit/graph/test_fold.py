"""A model captured from a few of its blocks is the model captured whole, name by name; one whose
blocks are not alike is captured whole; the model comes back as it was."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from autopar.errors import InternalError, OptionError
from autopar.graph.capture import capture_graph
from autopar.graph.fold import capture_folded
from autopar.graph.layers import check_layers, cluster_layers
from autopar.graph.precision import Precision
from autopar.graph.program import Graph, check_graph
from autopar.graph.repeat import Folded, whole_graph, with_copies
from autopar.verify import verify_plan
from tests.plans import random_plan
from tests.unit.graph import stacks
from tests.zoo import FAMILIES

torch.set_num_threads(1)

_DEPTHS = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers", "n_layers")
_DEPTHS += ("encoder_layers", "decoder_layers")


def deep(name: str, layers: int, **options: Any) -> tuple[nn.Module, Any]:
    """A model of the zoo with another number of layers, in train mode."""
    row = FAMILIES[name]
    depth = {key: layers for key in _DEPTHS if key in row.tiny}
    config = getattr(transformers, row.config)(**{**row.tiny, **depth, **options})
    torch.manual_seed(0)
    return getattr(transformers, row.model)(config).train(), row.batch(config, row.length)


def clustered(model: nn.Module, batch: Any, *rest: Any) -> Graph:
    return cluster_layers(capture_graph(model, batch, *rest))


def assert_same(got: Graph, want: Graph) -> None:
    """In all that the fingerprint holds, and in all else."""
    assert [str(op) for op in got.operators] == [str(op) for op in want.operators]
    assert got.fingerprint() == want.fingerprint()
    assert got.layer_names == want.layer_names
    assert got.inputs == want.inputs and got.outputs == want.outputs
    assert list(got.constants) == list(want.constants)
    for a, b in zip(got.operators, want.operators, strict=True):
        assert a == b


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, with the order of the modules."""
    return {
        name: {
            key: (list(value.items()) if isinstance(value, dict) else value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert list(before) == list(after)
    for name, attributes in before.items():
        assert list(attributes) == list(after[name])
        for key, value in attributes.items():
            other = after[name][key]
            if isinstance(value, list) and value and isinstance(value[0], tuple):
                assert [k for k, _ in value] == [k for k, _ in other]
                assert all(v is w for (_, v), (_, w) in zip(value, other, strict=True))
            else:
                assert other is value or other == value


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("gpt2", 6, {}),  # dropout, a tied head
        ("llama", 6, {}),
        ("bert", 4, {}),
        ("vit", 6, {}),
        ("falcon", 4, {}),  # constants
        pytest.param("mamba", 4, {}, marks=pytest.mark.slow),
        # Two lists; all blocks of the second read what the first makes.
        pytest.param("bart", 4, {}, marks=pytest.mark.slow),
        ("mixtral", 4, {"output_router_logits": False}),
    ],
)
def test_a_folded_capture_is_the_whole_one(name: str, layers: int, options: dict[str, Any]) -> None:
    model, batch = deep(name, layers, **options)
    whole = clustered(model, batch)
    before = snapshot(model)
    folded = capture_folded(model, batch)
    assert_untouched(before, model)
    assert folded.copies[:5] == (1, 1, layers - 2, 1, 1)
    assert folded.layer_names == whole.layer_names and folded.num_layers == len(whole.layer_names)
    assert_same(whole_graph(folded), whole)


def test_the_first_block_of_t5_is_another() -> None:
    model, batch = deep("t5", 5, num_decoder_layers=2)
    folded = capture_folded(model, batch)
    assert folded.copies == (1, 1, 1, 2, 1, 1, 1, 1, 1)
    assert_same(whole_graph(folded), clustered(model, batch))


def test_master_parameters_are_folded_too() -> None:
    model = stacks.Embedded(stacks.blocks())
    precision = Precision(torch.bfloat16)
    folded = capture_folded(model, torch.ones(4, stacks.WIDTH), None, precision)
    assert max(folded.copies) == 5
    assert_same(whole_graph(folded), clustered(model, torch.ones(4, stacks.WIDTH), None, precision))


@pytest.mark.parametrize("name", stacks.FOLDED)
def test_stacks_that_fold(name: str) -> None:
    build, copies = stacks.FOLDED[name]
    model, batch = build(), torch.ones(4, stacks.WIDTH)
    folded = capture_folded(model, batch)
    assert_same(whole_graph(folded), clustered(model, batch))
    assert folded.copies == copies


@pytest.mark.parametrize("name", stacks.WHOLE)
def test_stacks_that_do_not(name: str) -> None:
    model, batch = stacks.WHOLE[name](), torch.ones(4, stacks.WIDTH)
    before = snapshot(model)
    folded = capture_folded(model, batch)
    assert_untouched(before, model)
    assert set(folded.copies) == {1} and folded.num_layers == len(folded.layer_names)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("mixtral", {}),  # the balance loss reads every router
        ("gemma2", {}),  # local and global attention in turn
    ],
)
def test_models_with_a_catch_are_captured_whole(name: str, options: dict[str, Any]) -> None:
    assert set(capture_folded(*deep(name, 4, **options)).copies) == {1}


def test_one_group_of_albert_is_captured_whole() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "embedding_size": 16, "vocab_size": 64}
    config = transformers.AlbertConfig(num_hidden_layers=4, num_attention_heads=4, **sizes)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    model = transformers.AlbertForMaskedLM(config)
    assert set(capture_folded(model, {"input_ids": ids, "labels": ids}).copies) == {1}


def test_another_number_of_copies_is_another_depth() -> None:
    batch = torch.ones(4, stacks.WIDTH)
    for build, kind, changes in (
        (stacks.Embedded, stacks.Block, (-5, 2)),
        (stacks.Gated, stacks.GatedBlock, (-1,)),
    ):
        folded = capture_folded(build(stacks.blocks(8, kind)), batch)
        for added in changes:
            copies = tuple(n + added if n > 1 else 1 for n in folded.copies)
            got = with_copies(folded, copies)
            assert check_layers(check_graph(got)) is got
            assert_same(got, clustered(build(stacks.blocks(8 + added, kind)), batch))


def test_what_cannot_be_repeated_says_why() -> None:
    folded = capture_folded(stacks.Embedded(stacks.blocks()), torch.ones(4, stacks.WIDTH))
    for copies in ((2, 1, 1, 1, 1), (1, 2, 1, 1, 1), (1, 1, 2, 2, 1), (1, 1, 1, 1, 2)):
        with pytest.raises(OptionError, match="cannot be repeated"):
            with_copies(folded, copies)
    with pytest.raises(OptionError, match="5 positive numbers"):
        with_copies(folded, (1, 1, 0, 1, 1))
    with pytest.raises(InternalError):
        Folded(folded.graph, (1, 1))


def test_a_given_number_of_layers_makes_a_whole_graph() -> None:
    model, batch = stacks.Embedded(stacks.blocks()), torch.ones(4, stacks.WIDTH)
    folded = capture_folded(model, batch, num_layers=3)
    assert folded.copies == (1, 1, 1)
    assert_same(folded.graph, cluster_layers(capture_graph(model, batch), 3))


def test_a_step_of_the_whole_graph_agrees_with_eager() -> None:
    model, batch = stacks.Embedded(stacks.blocks()), torch.randn(8, stacks.WIDTH)
    graph = whole_graph(capture_folded(model, batch[:4]))
    report = verify_plan(model, batch, random_plan(graph, [(2,), (2,)], random.Random(0)))
    assert report.ok and report.eager is not None and report.dropout
