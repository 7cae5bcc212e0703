"""How matrices are described to cuBLASLt. What it makes of them: `test_epilogues`, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.ops.cublaslt import Epilogue, _aligned, _fits, _problem, problem_of

WIDE = torch.empty(16, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        pytest.param(WIDE, True, id="rows"),
        pytest.param(WIDE.t(), True, id="columns"),
        pytest.param(WIDE[:, :24], True, id="parts of rows"),
        pytest.param(WIDE[:1], True, id="one row"),
        pytest.param(WIDE[:, ::2], False, id="gaps in rows"),
        pytest.param(WIDE[:, :60].contiguous(), False, id="rows that are not aligned"),
        pytest.param(WIDE[:1].expand(16, 64), False, id="rows in one place"),
        pytest.param(WIDE.as_strided((8, 16), (8, 1)), False, id="rows that overlap"),
        pytest.param(WIDE[:0], False, id="nothing"),
        pytest.param(WIDE[0], False, id="one dim"),
    ],
)
def test_which_matrices_fit(x: Tensor, fits: bool) -> None:
    assert _fits(x) is fits


@pytest.mark.parametrize("a_by_columns", [False, True])
@pytest.mark.parametrize("b_by_columns", [False, True])
def test_how_operands_lie(
    a_by_columns: bool, b_by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    a = torch.empty(40, 24).t()[:, :32] if a_by_columns else torch.empty(24, 40)[:, :32]
    b = torch.empty(48, 32).t() if b_by_columns else torch.empty(32, 48)
    problem = _problem(a, b, Epilogue.NONE, torch.float32, 16, False)
    assert (problem.m, problem.k, problem.n) == (24, 32, 48)
    assert problem.by_columns == (a_by_columns, b_by_columns)
    assert problem.strides == (24 if a_by_columns else 40, 32 if b_by_columns else 48)
    assert problem.flops == 2 * 24 * 32 * 48


def test_a_copy_at_an_aligned_address_keeps_the_strides() -> None:
    x = torch.arange(0.0, 256.0).as_strided((4, 12), (64, 1), 3)
    copy = _aligned(x)
    assert copy is not x and copy.stride() == x.stride() and copy.data_ptr() % 16 == 0
    assert torch.equal(copy, x)
    assert _aligned(copy) is copy


def test_a_cpu_solves_none() -> None:
    assert problem_of(WIDE, WIDE.t(), Epilogue.NONE) is None
