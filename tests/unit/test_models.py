from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autopar.errors import OptionError
from autopar.models import load_model, load_pair, model_sources, parse_dtype, registered_models
from benchmarks.models import MODELS
from tests.zoo import SIZES, ZOO

SOURCE = """
import torch
from torch import nn
SIZE = 3
def linear():
    return nn.Linear(SIZE, SIZE), torch.ones(2, SIZE)
def needs_data():
    values = torch.ones(2).tolist()
    return nn.Linear(len(values), 2), torch.ones(2, 2)
def broken():
    raise KeyError("weights")
def alone():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "own_models.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_a_factory_of_a_file(source: Path) -> None:
    loaded = load_model(f"{source}:linear")
    assert loaded.name == "linear"
    assert tuple(loaded.example_batch.shape) == (2, 3)
    assert not loaded.on_meta


def test_on_meta_nothing_has_data(source: Path) -> None:
    loaded = load_model(f"{source}:linear", meta=True)
    assert loaded.on_meta
    assert loaded.example_batch.is_meta
    assert all(p.is_meta for p in loaded.module.parameters())


def test_a_factory_that_needs_data_is_built_for_real(source: Path) -> None:
    loaded = load_model(f"{source}:needs_data", meta=True)
    assert not loaded.on_meta
    assert not loaded.example_batch.is_meta


def test_dtype_is_that_of_module_and_batch(source: Path) -> None:
    loaded = load_model(f"{source}:linear", dtype="float64")
    assert loaded.example_batch.dtype == next(loaded.module.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{folder}/own_model.py:linear", "did you mean .*own_models.py"),
        ("{folder}/own_models.py:liner", "did you mean linear.*It has: linear, needs_data"),
        ("{folder}/own_models.py:SIZE", "is a int, not a factory"),
        ("{folder}/own_models.py:broken", "own_models.py.*KeyError: 'weights'"),
        ("{folder}/own_models.py:alone", "must return .module, example_batch.*got Linear"),
        ("no.such.module:linear", "no module is called 'no'"),
        ("gpt-1.3c", "did you mean gpt-1.3b"),
        (":linear", "MODEL is file.py:factory"),
    ],
)
def test_errors_say_what_is_there(source: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"(?s){message}"):
        load_model(text.format(folder=source.parent))


def test_a_file_that_cannot_be_imported_shows_its_own_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import torch\nvalue = 1 / 0\n", encoding="utf-8")
    with pytest.raises(OptionError, match=r"(?s)bad\.py.*line 2.*ZeroDivisionError"):
        load_model(f"{path}:linear")


def test_registered_names_are_the_zoo_and_the_benchmark_models() -> None:
    names = registered_models()
    assert {"gpt2", "llama", "bert", "vit", "t5", "wide_resnet", "unet", "gshard_moe"} <= set(names)
    assert {"gpt-tiny", "gpt-1.3b", "opt-6.7b", "mixtral-8x7b"} <= set(names)
    assert len(names) == len(MODELS) + len(ZOO) + len(SIZES), "one name, two models"
    assert set(model_sources()) == set(names)


def test_a_registered_model_is_the_same_each_time() -> None:
    (first, batch), (second, _) = load_pair("gpt-tiny"), load_pair("gpt-tiny")
    assert len(batch[0]) == 8
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_dtype() -> None:
    with pytest.raises(OptionError, match="int32"):
        parse_dtype("int32")
