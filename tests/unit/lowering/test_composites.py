"""Lowerings with local sizes, offsets or collectives of their own. Their numbers are the rule
oracle's business (tests/unit/sharding); here is what they communicate and in which precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from autopar.errors import InternalError
from autopar.graph.program import Ref
from autopar.layout import Offset
from autopar.lowering.composites import LOWERINGS, Site, lower_call
from autopar.lowering.composites.site import dim_offset
from autopar.lowering.emitter import Emitter
from autopar.lowering.program import Communicate, Compute
from autopar.mesh import LogicalMesh
from autopar.sharding.registry import rule_for, rules
from autopar.sharding.rule import Factor
from autopar.sharding.strategy import Strategy, make_strategy, strategies
from tests.oracles import Sample, disagreements, make_sample

aten = torch.ops.aten


def _lowered(
    target: Any, args: Sequence[Any], choice: str, mesh: tuple[int, ...] = (2,)
) -> tuple[Emitter, tuple[Ref, ...]]:
    sample = make_sample(target, args)
    rule = rule_for(sample.call)
    found = [s for s in strategies(rule, sample.call.operands, mesh) if s.text == choice]
    return _lower(sample, found[0], mesh)


def _lower(
    sample: Sample, strategy: Strategy, mesh: tuple[int, ...]
) -> tuple[Emitter, tuple[Ref, ...]]:
    emit = Emitter(mesh)
    rule = rule_for(sample.call)
    site = Site(emit, sample.op, sample.call, rule, strategy, sample.op.operands)
    return emit, lower_call(site)


def _collectives(emit: Emitter) -> Counter[str]:
    return Counter(f"{i.op} {i.reduce}" for i in emit.body if isinstance(i, Communicate))


def test_every_lowering_belongs_to_a_rule() -> None:
    assert set(LOWERINGS) <= set(rules())


def test_an_operator_without_a_lowering_is_called_on_shards() -> None:
    emit, results = _lowered(aten.mm.default, (torch.ones(4, 8), torch.ones(8, 4)), "k")
    (only,) = emit.body
    assert isinstance(only, Compute) and only.target is aten.mm.default
    assert results == (Ref(only.name),)


def test_vocab_parallel_log_softmax_reduces_a_maximum_and_a_sum() -> None:
    args = (torch.randn(4, 8), 1, False)
    emit, _ = _lowered(aten._log_softmax.default, args, "d1")
    assert _collectives(emit) == {"all_reduce max": 1, "all_reduce sum": 1}
    emit, _ = _lowered(aten._log_softmax.default, args, "d0")
    assert not _collectives(emit)


def test_batch_norm_over_a_sharded_batch_reduces_twice() -> None:
    x, c = torch.randn(4, 2, 3), torch.ones(2)
    args = (x, c, c.clone(), c.clone(), c.clone(), True, 0.1, 1e-5)
    target = aten._native_batch_norm_legit_functional.default
    assert _collectives(_lowered(target, args, "n")[0]) == {"all_reduce sum": 2}
    assert not _collectives(_lowered(target, args, "c")[0])
    evaluated = (*args[:5], False, *args[6:])
    assert not _collectives(_lowered(target, evaluated, "n")[0])


def test_a_vocab_parallel_lookup_communicates_nothing() -> None:
    emit, _ = _lowered(aten.embedding.default, (torch.ones(8, 4), torch.arange(4)), "v")
    assert not _collectives(emit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_run_in_float32(dtype: torch.dtype) -> None:
    """A composite in low precision is as near to the whole operator as its own rounding."""
    torch.manual_seed(0)
    x = torch.randn(8, 16).to(dtype)
    c = torch.ones(16)
    generator = torch.Generator().manual_seed(0)
    norm = (x, c, c.clone(), c.clone(), c.clone(), True, 0.1, 1e-5)
    for target, args in (
        (aten._log_softmax.default, (x, 1, False)),
        (aten._log_softmax_backward_data.default, (x, x.log_softmax(1), 1, dtype)),
        (torch.ops.autopar.cross_entropy.default, (x, torch.arange(8) + 3, -100)),
        (aten._native_batch_norm_legit_functional.default, norm),
    ):
        sample = make_sample(target, args)
        keep = lambda call: _without_linear(rule_for(call))  # noqa: E731
        _, wrong = disagreements(
            sample, LogicalMesh((2,)), make_rule=keep, tolerance=8e-3, generator=generator
        )
        assert not wrong, str(wrong[0])


def test_a_shard_of_padding_alone_adds_nothing_to_the_loss() -> None:
    args = (torch.randn(8, 5).double(), torch.arange(8) % 5, 3)  # classes: 2, 2, 1 and none
    sample = make_sample(torch.ops.autopar.cross_entropy.default, args)
    generator = torch.Generator().manual_seed(0)
    tried, wrong = disagreements(sample, LogicalMesh((4,)), generator=generator)
    assert tried and not wrong, str(wrong[:1])


def _without_linear(rule: Any) -> Any:
    from dataclasses import replace

    return replace(rule, factors=tuple(f for f in rule.factors if f.splits))


def test_positions_start_at_the_shard() -> None:
    emit, _ = _lowered(aten.arange.start_step, (3, 19, 2), "d0", (4,))
    assert emit.body[0].args[:2] == (Offset((4,), 3), Offset((4,), 7))  # type: ignore[union-attr]


def test_a_composite_without_a_lowering_is_a_bug() -> None:
    sample = make_sample(aten.relu.default, (torch.ones(4),))
    factor = Factor("x", 4, (0,), (0,), lowering="unheard of")
    strategy = make_strategy(rule_for(sample.call), [factor], 1, (2,))
    with pytest.raises(InternalError, match="unheard of"):
        _lower(sample, strategy, (2,))


def test_an_offset_needs_one_run_of_rows() -> None:
    assert dim_offset(((4, 2), (3,)), (0,), (2,), 0) == Offset((4,))
    assert dim_offset(((4, 2), ()), (0,), (2,), 1) == Offset((0,))
    with pytest.raises(InternalError):
        dim_offset(((4, 2),), (1,), (2,), 0)
