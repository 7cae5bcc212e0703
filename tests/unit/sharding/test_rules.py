"""Every rule is sound on every strategy that it offers: whole and sharded runs agree."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.layout import Dims, raw_dims
from autopar.mesh import LogicalMesh
from autopar.sharding.registry import rule_for, rules
from autopar.sharding.strategy import strategies
from tests.oracles import MESHES, disagreements, make_sample
from tests.unit.sharding.case import Case
from tests.unit.sharding.cases import UNINITIALISED, all_cases
from tests.unit.sharding.sized_cases import FAMILIES

aten = torch.ops.aten
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


UNEVEN = ((_whole, LogicalMesh((3,))), (_split, LogicalMesh((3, 2))))  # of 4 and 8 rows

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

# Factors that take even shards only.
EVEN_ONLY = {
    aten.histc.default: "zeros in the padding fall into a bin",
    aten.index_put.default: "a value that is given once would be added by the padding too",
    aten._unsafe_index_put.default: "as index_put",
    aten.soft_margin_loss.default: "the loss of zeros is log 2",
    aten.binary_cross_entropy_with_logits.default: "the loss of zeros is log 2",
    torch.ops.autopar.experts.default: "an exchange gives every device as many experts",
    torch.ops.autopar.experts_backward.default: "an exchange gives every device as many experts",
}

# In the accumulation of shards, and of pending sums of integers up to 4, several roundings.
BF16_TOLERANCE = 24 * torch.finfo(torch.bfloat16).eps
NO_KERNEL = "the CPU has no bfloat16 kernel"
NO_BF16 = {
    aten.special_log_ndtr.default: NO_KERNEL,
    aten.special_erfcx.default: NO_KERNEL,
    aten.avg_pool3d.default: NO_KERNEL,
    aten.avg_pool3d_backward.default: NO_KERNEL,
    aten._upsample_bilinear2d_aa.default: NO_KERNEL,
    aten._upsample_bilinear2d_aa_backward.default: NO_KERNEL,
}
# Position of lse: float32 in training in bfloat16.
LSE = {
    torch.ops.autopar.sdpa_backward.default: 6,
    torch.ops.autopar.sdpa_dropout_backward.default: 5,
}


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


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_uneven_shards_equal_whole(case: Case) -> None:
    """Padding holds NaN and huge integers: a rule that lets any of it through is seen."""
    generator = torch.Generator().manual_seed(0)
    for dims, mesh in UNEVEN:
        sample = make_sample(case.target, case.args, case.kwargs, dims)
        _, wrong = disagreements(sample, mesh, generator=generator)
        assert not wrong, str(wrong[0])


def test_what_is_uneven_and_what_is_not() -> None:
    """Every factor that shares the work does so unevenly too, but for the reasons in the table."""
    tried: Counter[str] = Counter()
    even_only = set()
    for case in CASES:
        sample = make_sample(case.target, case.args, case.kwargs)
        rule = rule_for(sample.call)
        even_only |= {case.target for f in rule.factors if f.splits and f.fill is None}
        for mesh in (*MESHES, *(mesh for _, mesh in UNEVEN)):
            for strategy in strategies(rule, sample.call.operands, mesh.axis_sizes):
                uneven = any(
                    f and f.size % n for f, n in zip(strategy.factors, mesh.axis_sizes, strict=True)
                )
                tried["uneven" if uneven else "even"] += 1
                tried["filled"] += bool(strategy.fills)
    print(f"{len(CASES)} cases, strategies: {dict(tried)}")
    assert even_only == EVEN_ONLY.keys()
    assert tried["uneven"] > 2000 and tried["filled"] > 400


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_bfloat16(case: Case) -> None:
    if case.target in NO_BF16:
        with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):
            make_sample(case.target, *_in_bf16(case))
        return
    sample = make_sample(case.target, *_in_bf16(case))
    generator = torch.Generator().manual_seed(0)
    for mesh in (MESHES[0], UNEVEN[0][1]):
        _, wrong = disagreements(sample, mesh, generator=generator, tolerance=BF16_TOLERANCE)
        assert not wrong, str(wrong[0])


def _in_bf16(case: Case) -> tuple[list[Any], dict[str, Any]]:
    """The arguments; a tensor that is passed twice stays one value."""
    done: dict[int, torch.Tensor] = {}

    def narrow(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            floating = item.is_floating_point()
            return done.setdefault(id(item), item.bfloat16() if floating else item)
        if isinstance(item, (tuple, list)):
            return type(item)(narrow(part) for part in item)
        return torch.bfloat16 if item is torch.float64 else item

    args = [narrow(item) for item in case.args]
    if (lse := LSE.get(case.target)) is not None:
        args[lse] = case.args[lse].float()
    return args, {key: narrow(item) for key, item in case.kwargs.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.integers(2, 7), min_size=4, max_size=4),
    st.sampled_from([(2,), (3,), (4,), (2, 2)]),
)
def test_any_sizes(family: str, sizes: list[int], mesh: tuple[int, ...]) -> None:
    for case in FAMILIES[family](*sizes):
        sample = make_sample(case.target, case.args, case.kwargs)
        generator = torch.Generator().manual_seed(0)
        _, wrong = disagreements(sample, LogicalMesh(mesh), generator=generator)
        assert not wrong, str(wrong[0])


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
