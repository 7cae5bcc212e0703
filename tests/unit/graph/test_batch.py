"""How a global batch is cut."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import BatchError
from autopar.graph.batch import batch_rows, common_rows, microbatch_of


def test_rows_are_the_most_common_first_size_then_that_of_the_richest_leaf() -> None:
    assert common_rows([(16,), (4, 16), (4, 16)]) == 4
    assert common_rows([(16,), (4, 16)]) == 4
    assert common_rows([(), (3,)]) == 3
    assert common_rows([()]) is None


def test_leaves_with_rows_are_cut_and_others_shared() -> None:
    batch = {"position_ids": torch.arange(16), "input_ids": torch.arange(64).view(4, 16), "k": 3}
    assert batch_rows(batch) == 4
    part = microbatch_of(batch, 2, 1)
    assert torch.equal(part["input_ids"], batch["input_ids"][2:])
    assert part["position_ids"] is batch["position_ids"] and part["k"] == 3
    assert microbatch_of(batch, 1) is batch


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(BatchError, match="4 rows does not divide into 3"):
        microbatch_of(torch.zeros(4, 2), 3)
