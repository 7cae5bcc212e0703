from __future__ import annotations

import pytest
import torch

from autopar.runtime.strides import with_strides


@pytest.mark.parametrize(
    ("shape", "is_view"), [((4, 3, 1, 1), True), ((4, 1, 2, 1), True), ((4, 3, 2, 2), False)]
)
def test_only_what_lies_otherwise_is_copied(shape: tuple[int, ...], is_view: bool) -> None:
    row_major = torch.randn(shape)
    last = row_major.clone(memory_format=torch.channels_last)
    assert last.stride() != row_major.stride()
    found = with_strides(last, row_major.stride())
    assert found.stride() == row_major.stride()
    assert torch.equal(found, row_major)
    assert (found.data_ptr() == last.data_ptr()) is is_view
    assert with_strides(row_major, row_major.stride()) is row_major
