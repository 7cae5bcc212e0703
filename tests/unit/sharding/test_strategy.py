"""Strategies: which assignments of axes to factors are valid, and the layouts that follow."""

from __future__ import annotations

from dataclasses import replace

import torch

from autopar.layout import PARTIAL, REPLICATE, is_valid
from autopar.sharding.registry import rule_for
from autopar.sharding.strategy import layouts, strategies
from tests.oracles import make_sample

aten = torch.ops.aten
F64 = torch.float64


def _matmul(i: int = 4, k: int = 8, j: int = 4):  # type: ignore[no-untyped-def]
    sample = make_sample(aten.mm.default, (torch.ones(i, k), torch.ones(k, j)))
    return rule_for(sample.call), sample.call.operands


def test_matmul_on_one_axis() -> None:
    rule, operands = _matmul()
    found = {s.text: s for s in strategies(rule, operands, (2,))}
    assert list(found) == ["-", "i", "k", "j", "+0", "+1"]
    assert found["k"].operands == ((1,), (0,)) and found["k"].results == ((PARTIAL,),)
    assert found["-"].num_splits == found["+0"].num_splits == 1 and found["i"].num_splits == 2


def test_uneven_shares_count_their_padding() -> None:
    rule, operands = _matmul(i=5, k=6, j=3)
    found = {s.text: s for s in strategies(rule, operands, (4,))}
    assert set(found) == {"-", "i", "k", "+0", "+1"}  # three rows are too few for four devices
    assert found["i"].num_splits == 5 / 2 and not found["i"].fills
    assert found["k"].num_splits == 6 / 2 and found["k"].fills == ((0, 0, 0), (1, 0, 0))


def test_a_factor_that_cannot_fill_its_padding_takes_divisors_only() -> None:
    rule, operands = _matmul(i=6, k=5, j=8)
    even = replace(rule, factors=tuple(replace(f, fill=None) for f in rule.factors))
    assert {s.text for s in strategies(even, operands, (4,))} == {"-", "j", "+0", "+1"}


def test_an_uneven_atom_is_as_large_as_its_factor() -> None:
    """Two of three shards of 4 groups are no shards of 8 heads."""
    q, k = torch.ones(2, 8, 4, 4), torch.ones(2, 4, 4, 4)
    sample = make_sample(torch.ops.autopar.sdpa.default, (q, k, k, None, False, 0.5))
    rule = rule_for(sample.call)
    assert {s.text for s in strategies(rule, sample.call.operands, (2,))} == {"-", "b", "h", "s"}
    assert {s.text for s in strategies(rule, sample.call.operands, (3,))} == {"-", "s"}


def test_two_axes_on_one_factor_divide_it_together() -> None:
    rule, operands = _matmul(i=4, k=8, j=6)
    texts = {s.text for s in strategies(rule, operands, (2, 2))}
    assert "j -" in texts and "- j" in texts
    assert "i i" in texts and "k k" in texts and "j j" not in texts and "i j" in texts


def test_an_axis_of_size_one_is_given_to_nothing() -> None:
    rule, operands = _matmul()
    assert {s.factors[0] for s in strategies(rule, operands, (1, 2))} == {None}


def test_all_replicated_comes_first_and_all_layouts_are_valid() -> None:
    rule, operands = _matmul()
    found = strategies(rule, operands, (2, 4))
    assert found[0].text == "- -" and found[0].results == ((REPLICATE, REPLICATE),)
    for strategy in found:
        for dims, layout in zip(operands, strategy.operands, strict=True):
            assert is_valid(dims, layout, (2, 4))
    assert len({s.factors for s in found}) == len(found)


def test_layouts_of_a_tensor() -> None:
    assert layouts(((4,), (6,)), (2,)) == ((REPLICATE,), (0,), (1,))
    assert (0, 0) in layouts(((4,), (6,)), (2, 2)) and (1, 1) not in layouts(((4,), (6,)), (2, 2))
    assert (PARTIAL,) in layouts((), (2,), partial=True)
    assert layouts(((0,),), (2,)) == ((REPLICATE,),)
