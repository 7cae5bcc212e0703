"""Which sums over rows are made of rows in registers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V

from autopar.compile.reductions import MOST_KEPT, kept_rows


def is_kept(elements: int, hint: ReductionHint, *, cooperative: bool = False) -> bool:
    features: Any = SimpleNamespace(
        get_reduction_hint=lambda: hint,
        reduction_numel=sympy.Integer(elements),
        numel=sympy.Integer(64),
    )
    graph: Any = SimpleNamespace(sizevars=SizeVarAllocator())
    with V.set_graph_handler(graph):
        return bool(V.choices.should_use_persistent_reduction(features, cooperative))


@pytest.mark.parametrize("elements", [768, 2048, MOST_KEPT])
def test_rows_of_norms_are_kept(elements: int) -> None:
    assert is_kept(elements, ReductionHint.INNER) == (elements <= 1024)
    with kept_rows():
        assert is_kept(elements, ReductionHint.INNER)
    assert is_kept(elements, ReductionHint.INNER) == (elements <= 1024)


def test_long_rows_and_columns_are_not() -> None:
    with kept_rows():
        assert not is_kept(MOST_KEPT + 1, ReductionHint.INNER)
        assert not is_kept(2048, ReductionHint.OUTER)
        assert not is_kept(2048, ReductionHint.INNER, cooperative=True)


def test_what_is_cached_knows_of_it() -> None:
    before = torch.compiler.config.cache_key_tag
    with kept_rows():
        assert torch.compiler.config.cache_key_tag != before
    assert torch.compiler.config.cache_key_tag == before
