"""A graph between two captured sizes of the microbatch is the one that a capture makes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import BatchError, CaptureError
from autopar.forks import num_processors
from autopar.graph.family import GraphFamily
from tests.unit.graph import stacks
from tests.unit.graph.test_fold import deep
from tests.zoo import ZOO

torch.set_num_threads(1)


_SLOW = pytest.param("t5", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["gpt2", "llama", _SLOW, "mixtral", "vit", "wide_resnet"])
def test_a_size_between_two_captures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = GraphFamily(*(ZOO[name]() if name == "wide_resnet" else deep(name, 2)))  # 8 rows
    family.at(1), family.at(4)
    with monkeypatch.context() as patch:
        patch.setattr("autopar.graph.family.capture_folded", _must_not_be_called)
        got = family.at(2)
        assert family.at(2) is got
    want = family.exact(2)
    assert got.graph.fingerprint() == want.graph.fingerprint()
    assert got.graph.inputs == want.graph.inputs and got.graph.operators == want.graph.operators
    assert got.copies == want.copies and got.layer_names == want.layer_names


def _must_not_be_called(*_args: object) -> None:
    raise AssertionError("a capture was made")


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each capture that is made."""
    from autopar.graph import family

    capture, rows = family.capture_folded, []

    def counted(model: nn.Module, batch: Tensor, *rest: object) -> object:
        rows.append(batch.shape[0])
        return capture(model, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(family, "capture_folded", counted)
    return rows


def test_captures_are_made_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _counted(monkeypatch)
    family = GraphFamily(stacks.Embedded(stacks.blocks()), torch.ones(32, stacks.WIDTH))
    assert rows == []
    family.at(4)
    assert rows == [8]
    for number in (4, 8, 2, 16, 1):
        family.at(number)
    assert rows == [8, 2, 32]
    family.at(32)
    assert rows == [8, 2, 32, 1]
    with pytest.raises(BatchError):
        family.at(5)


class Rounded(stacks.Embedded):
    """Rows are padded to a multiple of four, as experts' capacities are."""

    def forward(self, x: Tensor) -> Tensor:
        short = -x.shape[0] % 4
        return super().forward(nn.functional.pad(x, (0, 0, 0, short)))


class Squared(stacks.Embedded):
    """Every row meets every row, as in a contrastive loss."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        return (y @ y.T).reshape(-1).softmax(0).pow(2).sum()


@pytest.mark.parametrize("model", [Rounded, Squared])
def test_what_does_not_grow_with_the_rows_is_captured(
    model: type[stacks.Embedded], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _counted(monkeypatch)
    family = GraphFamily(model(stacks.blocks(2)), torch.ones(24, stacks.WIDTH))
    for number in (1, 2, 4, 12):
        family.at(number)
        assert family.at(number).graph.fingerprint() == family.exact(number).graph.fingerprint()
    assert sorted(rows) == [2, 6, 12, 24]


def test_reciprocals_and_odd_ratios() -> None:
    def loss(outputs: Tensor, _batch: Tensor) -> Tensor:
        return outputs * (1.0 / _batch.shape[0])

    family = GraphFamily(stacks.Embedded(stacks.blocks(2)), torch.ones(36, stacks.WIDTH), loss)
    for number in (1, 18, 3, 4):
        got = family.at(number).graph
        assert got.fingerprint() == family.exact(number).graph.fingerprint()


@pytest.mark.skipif(num_processors() == 1, reason="captures ahead take another processor")
def test_what_is_expected_is_captured_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(GraphFamily(*deep("gpt2", 2))) as family:  # dropout, constants
        family.expect_all((1, 2, 4, 8))
        whole = family.at(1)
        with monkeypatch.context() as patch:
            patch.setattr("autopar.graph.family.capture_folded", _must_not_be_called)
            got = family.exact(4)
    want = GraphFamily(*deep("gpt2", 2)).exact(4)
    assert got.graph.fingerprint() == want.graph.fingerprint() != whole.graph.fingerprint()
    assert got.graph.inputs == want.graph.inputs and got.graph.operators == want.graph.operators
    assert got.graph.batch_spec == want.graph.batch_spec and got.copies == want.copies
    assert family.exact(8).graph.operators  # of one row: expected, and not awaited


def test_an_expected_capture_that_fails_says_so_where_it_is_asked_for() -> None:
    def loss(outputs: Tensor, _batch: Tensor) -> Tensor:
        if len(_batch) == 2:
            raise ValueError("two rows")
        return outputs

    model = stacks.Embedded(stacks.blocks(2))
    with contextlib.closing(GraphFamily(model, torch.ones(8, stacks.WIDTH), loss)) as family:
        family.expect_all((1, 4))
        family.at(1)
        with pytest.raises(CaptureError, match="two rows"):
            family.at(4)
