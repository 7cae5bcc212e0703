"""Every rule is sound on every strategy that it offers: whole and sharded runs agree."""

from __future__ import annotations

import pytest
import torch

from autopar.layout import Dims, raw_dims
from autopar.mesh import LogicalMesh
from autopar.sharding.registry import rule_for, rules
from autopar.sharding.strategy import strategies
from tests.oracles import MESHES, disagreements, make_sample
from tests.unit.sharding.case import Case
from tests.unit.sharding.cases import UNINITIALISED, all_cases

CASES = all_cases()
CHECKED = [case for case in CASES if case.target not in UNINITIALISED]


def _split(_number: int, shape: tuple[int, ...]) -> Dims:
    """Every even dim as two atoms, as after a view."""
    return tuple((2, n // 2) if n > 2 and n % 2 == 0 else (n,) if n != 1 else () for n in shape)


def _odd_split(number: int, shape: tuple[int, ...]) -> Dims:
    return _split(number, shape) if number % 2 else raw_dims(shape)


def _even_split(number: int, shape: tuple[int, ...]) -> Dims:
    return raw_dims(shape) if number % 2 else _split(number, shape)


def _whole(_number: int, shape: tuple[int, ...]) -> Dims:
    return raw_dims(shape)


DIMS = {"whole": _whole, "split": _split, "odd": _odd_split, "even": _even_split}


# Their result needs all of the operand, or is one number.
EMPTY = [
    "aten.all.default",
    "aten.any.default",
    "aten.max.default",
    "aten.min.default",
    "aten.norm.Scalar",
    "aten.prod.default",
    "aten.scalar_tensor.default",
]


def test_every_rule_has_a_case() -> None:
    covered = {case.target for case in CASES}
    missing = sorted(str(target) for target in rules() if target not in covered)
    print(f"{len(rules())} rules, {len(CASES)} cases")
    assert not missing


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_sharded_equals_whole(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    for dims in DIMS.values():
        sample = make_sample(case.target, case.args, case.kwargs, dims)
        for mesh in MESHES:
            _, wrong = disagreements(sample, mesh, generator=generator)
            assert not wrong, str(wrong[0])


def test_sizes_that_do_not_divide_offer_no_split() -> None:
    mesh = LogicalMesh((7,))
    for case in CASES:
        sample = make_sample(case.target, case.args, case.kwargs)
        rule = rule_for(sample.call)
        for strategy in strategies(rule, sample.call.operands, mesh.axis_sizes):
            split = [f for f in strategy.factors if f is not None and f.splits]
            sizes = {size for i in sample.call.operands for dim in i for size in dim}
            sizes |= {n for meta in sample.call.results if meta is not None for n in meta.shape}
            assert not split or any(size % 7 == 0 for size in sizes), f"{case}: {strategy.text}"


def test_no_sum_is_pending_on_integers() -> None:
    for case in CASES:
        sample = make_sample(case.target, case.args, case.kwargs)
        for factor in rule_for(sample.call).factors:
            for meta, placement in zip(sample.call.results, factor.results, strict=True):
                assert placement != -2 or meta is None or meta.dtype.is_floating_point, str(case)
            for dtype, placement in zip(sample.call.dtypes, factor.operands, strict=True):
                assert placement != -2 or dtype.is_floating_point, str(case)


def test_most_rules_offer_something() -> None:
    """A rule that offers nothing is a rule in name only; these have a reason."""
    offers = {
        case.target
        for case in CASES
        if rule_for(make_sample(case.target, case.args, case.kwargs).call).factors
    }
    empty = sorted(str(target) for target in rules() if target not in offers)
    assert empty == EMPTY
