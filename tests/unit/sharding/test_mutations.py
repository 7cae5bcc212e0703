"""The rule oracle is worth what it catches: rules made wrong on purpose, each of which it must
see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from autopar.graph.program import Ref
from autopar.layout import PARTIAL, REPLICATE, Offset
from autopar.lowering import composites
from autopar.lowering.composites import vocabulary
from autopar.lowering.composites.site import Site
from autopar.mesh import LogicalMesh
from autopar.sharding.registry import rule_for
from autopar.sharding.rule import Call, Factor, Rule
from tests.oracles import MESHES, disagreements, make_sample
from tests.unit.sharding.case import Case, bools, ints, positive, x

aten = torch.ops.aten
P, R = PARTIAL, REPLICATE
Mutate = Callable[[Rule], Rule]


@dataclass(frozen=True)
class Mutation:
    """A case, and what is made wrong: the rule, or the lowering of its operator."""

    name: str
    case: Case
    rule: Mutate = lambda rule: rule
    lowering: Callable[[Site], tuple[Ref, ...]] | None = None
    patches: Mapping[str, Any] | None = None  # of the module `vocabulary`


def _with(operands: tuple[int, ...], results: tuple[int, ...], size: int = 0) -> Mutate:
    """One more factor."""
    factor = Factor("wrong", size, operands, results, splits=size > 0)
    return lambda rule: replace(rule, factors=(*rule.factors, factor))


def _local(lowering: str) -> Mutate:
    """A composite is called local."""

    def mutate(rule: Rule) -> Rule:
        factors = (
            replace(f, lowering="" if f.lowering == lowering else f.lowering) for f in rule.factors
        )
        return replace(rule, factors=tuple(factors))

    return mutate


def _results(name: str, results: tuple[int, ...]) -> Mutate:
    """The factor of this name has other results."""

    def mutate(rule: Rule) -> Rule:
        assert any(f.name == name for f in rule.factors)
        factors = (replace(f, results=results) if f.name == name else f for f in rule.factors)
        return replace(rule, factors=tuple(factors))

    return mutate


def _fill(name: str, fill: tuple[float | None, ...]) -> Mutate:
    """The factor of this name leaves its padding otherwise."""

    def mutate(rule: Rule) -> Rule:
        assert any(f.name == name and f.fill is not None for f in rule.factors)
        factors = (replace(f, fill=fill) if f.name == name else f for f in rule.factors)
        return replace(rule, factors=tuple(factors))

    return mutate


def _uneven(name: str, fill: tuple[float | None, ...]) -> Mutate:
    """A factor that takes even shards only takes uneven ones."""

    def mutate(rule: Rule) -> Rule:
        assert any(f.name == name and f.fill is None for f in rule.factors)
        factors = (replace(f, fill=fill) if f.name == name else f for f in rule.factors)
        return replace(rule, factors=tuple(factors))

    return mutate


def _as_it_is(site: Site) -> tuple[Ref, ...]:
    return site.call_with({})


def _local_dropout(site: Site) -> tuple[Ref, ...]:
    shape = site.result_shape()
    return site.call_with({4: shape, 5: shape, 6: [0] * len(shape), 7: 1})


def _queries_alone(site: Site) -> tuple[Ref, ...]:
    start = site.offset(site.call.operands[0], site.strategy.operands[0], 2)
    return site.call_with({9: [0, 0, start]})


def _arange_from_zero(site: Site) -> tuple[Ref, ...]:
    return (site.emit.compute(aten.arange.default, site.result_shape()[0]),)


def _no_mask(*args: Any) -> tuple[Ref, Ref]:
    """Rows that are elsewhere are taken for row 0."""
    emit, index, start, length, _ = args
    local = emit.compute(aten.sub.Scalar, index, start)
    return emit.compute(aten.clamp.default, local, 0, length - 1), emit.compute(
        aten.lt.Scalar, emit.compute(aten.mul.Scalar, index, 0), 0
    )


_ROWS_HERE = vocabulary._rows_here


def _forgets_ignored(*args: Any) -> tuple[Ref, Ref]:
    return _ROWS_HERE(*args[:4], None)


def _from_zero(*args: Any) -> tuple[Ref, Ref]:
    emit, index, start, length, ignore = args
    return _ROWS_HERE(emit, index, Offset((0,) * len(start.strides)), length, ignore)


A, B = x(4, 8), x(4, 8, seed=1)
MASK = bools(4, 8)
LOGITS = x(4, 8)
LABELS = torch.tensor([3, 1, 3, 6])
IMAGE, KERNEL = x(4, 4, 5, 5), x(8, 4, 3, 3, seed=1)
PADS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
NORM = (x(4, 8, 3), x(8, seed=1), x(8, seed=2), x(8, seed=3), positive(8), True, 0.1, 1e-5)
Q = x(2, 4, 8, 4)
ROUTED = (x(8, 4), ints(8, 8, 2), positive(8, 2), x(8, 2, 4, 4, seed=1), x(8, 4, 4, seed=2))
EXPERTS = Case(torch.ops.autopar.experts.default, (*ROUTED, "silu", 0, 8))
EXPERTS_BACKWARD = Case(
    torch.ops.autopar.experts_backward.default, (x(8, 4, seed=3), *ROUTED, "silu", 0, 8)
)
DENSE = aten.embedding_dense_backward.default
SEED = torch.tensor([5, 0], dtype=torch.int32)
WHOLE = ([2, 4, 8], [0, 0, 0])  # of Q
UNARY = {
    name: _with((P,), (P,)) for name in ("tanh", "relu", "silu", "gelu", "sigmoid", "abs", "exp")
}

# Uneven shards: (operator, case, factor, what its padding holds wrongly).
LEAKS = (
    ("mm", Case(aten.mm.default, (A, x(8, 4))), "k", (0, None)),
    ("sum", Case(aten.sum.default, (A,)), "d1", (None,)),
    ("mean", Case(aten.mean.dim, (A, [1])), "d1", (1,)),
    ("log_softmax", Case(aten._log_softmax.default, (A, 1, False)), "d1", (0,)),
    (
        "log_softmax backward",
        Case(aten._log_softmax_backward_data.default, (A, LOGITS.log_softmax(1), 1, A.dtype)),
        "d1",
        (None, None),
    ),
    ("batch norm", Case(aten._native_batch_norm_legit_functional.default, NORM), "n", (1,) * 5),
    (
        "nll",
        Case(aten.nll_loss_forward.default, (LOGITS, LABELS, None, 2, -100)),
        "n",
        (0, 0),
    ),
    (
        "layer norm backward",
        Case(
            aten.native_layer_norm_backward.default,
            (A, B, [8], x(4, 1), positive(4, 1), x(8), x(8), [True, True, True]),
        ),
        "d0",
        (None, 0, 0, 0, None, None),
    ),
    ("embedding", Case(aten.embedding.default, (x(8, 4), ints(8, 8))), "t0", (None, None)),
    ("embedding backward", Case(DENSE, (x(8, 4), ints(8, 8), 8, -1, False)), "t0", (None, 0)),
    ("division", Case(aten.floor_divide.default, (ints(9, 7), ints(3, 7) + 1)), "d0", (None, None)),
    ("gather", Case(aten.gather.default, (A, 1, ints(8, 4, 2))), "d0", (None, None)),
)

MUTATIONS = (
    *(
        Mutation(f"{name} passes a sum", Case(getattr(aten, name).default, (A,)), mutate)
        for name, mutate in UNARY.items()
    ),
    Mutation("pow passes a sum", Case(aten.pow.Tensor_Scalar, (A, 2)), _with((P,), (P,))),
    Mutation("adding a number is linear", Case(aten.add.Tensor, (A, 2.0)), _with((P,), (P,))),
    Mutation("x * x is linear", Case(aten.mul.Tensor, (A, A)), _with((P, P), (P,))),
    Mutation("x * y jointly", Case(aten.mul.Tensor, (A, B)), _with((P, P), (P,))),
    Mutation("add: one sum", Case(aten.add.Tensor, (A, B)), _with((P, R), (P,))),
    Mutation(
        "linear in a divisor", Case(aten.div.Tensor, (A, positive(4, 8))), _with((R, P), (P,))
    ),
    Mutation(
        "masked_fill of 2", Case(aten.masked_fill.Scalar, (A, MASK, 2.0)), _with((P, R), (P,))
    ),
    Mutation("where: one branch", Case(aten.where.self, (MASK, A, B)), _with((R, P, R), (P,))),
    Mutation("softmax dim", Case(aten._softmax.default, (A, -1, False)), _with((1,), (1,), 8)),
    Mutation("logsumexp pending", Case(aten.logsumexp.default, (A, [1])), _with((1,), (P,), 8)),
    Mutation("amax pending", Case(aten.amax.default, (A, [1])), _with((1,), (P,), 8)),
    Mutation("max.dim pending", Case(aten.max.dim, (A, 1)), _with((1,), (P, P), 8)),
    Mutation("local mean", Case(aten.mean.dim, (A, [1])), _local("mean")),
    Mutation("local mse", Case(aten.mse_loss.default, (A, B, 1)), _local("mean_loss")),
    Mutation("local log_softmax", Case(aten._log_softmax.default, (A, 1, False)), _local("vp")),
    Mutation(
        "local log_softmax backward",
        Case(aten._log_softmax_backward_data.default, (A, LOGITS.log_softmax(1), 1, A.dtype)),
        _local("vp"),
    ),
    Mutation(
        "nll weight pending over classes",
        Case(aten.nll_loss_forward.default, (LOGITS, LABELS, None, 2, -100)),
        _results("v", (P, P)),
    ),
    Mutation(
        "nll targets from 0",
        Case(aten.nll_loss_forward.default, (LOGITS, LABELS, None, 2, -100)),
        patches={"_rows_here": _from_zero},
    ),
    Mutation(
        "nll counts what is ignored",
        Case(aten.nll_loss_backward.default, (x(), LOGITS, LABELS, None, 2, 3, x())),
        patches={"_rows_here": _forgets_ignored},
    ),
    Mutation(
        "embedding without its mask",
        Case(aten.embedding.default, (x(8, 4), ints(8, 4))),
        patches={"_rows_here": _no_mask},
    ),
    Mutation(
        "embedding whole", Case(aten.embedding.default, (x(8, 4), ints(8, 4))), _results("v", (R,))
    ),
    Mutation(
        "embedding padding is local",
        Case(DENSE, (x(8, 4), torch.arange(8), 8, 5, False)),
        patches={"_rows_here": _forgets_ignored},
    ),
    Mutation(
        "frequencies of a shard",
        Case(DENSE, (x(8, 4), ints(2, 8), 8, -1, True)),
        _with((0, 0), (P,), 8),
    ),
    Mutation(
        "batch norm of a shard",
        Case(aten._native_batch_norm_legit_functional.default, NORM),
        _local("bn"),
    ),
    Mutation(
        "layer norm's own dim",
        Case(aten.native_layer_norm.default, (x(4, 2, 8), [2, 8], None, None, 1e-5)),
        _with((1,), (1, R, R), 2),
    ),
    Mutation(
        "layer norm's gradient whole",
        Case(
            aten.native_layer_norm_backward.default,
            (A, B, [8], x(4, 1), positive(4, 1), x(8), x(8), [True, True, True]),
        ),
        _results("d0", (0, R, R)),
    ),
    Mutation("mm's k whole", Case(aten.mm.default, (A, x(8, 4))), _results("k", (R,))),
    Mutation("mm's k sharded", Case(aten.mm.default, (A, x(8, 4))), _results("k", (0,))),
    Mutation("mm linear in both", Case(aten.mm.default, (A, x(8, 4))), _with((P, P), (P,))),
    Mutation("addmm's k", Case(aten.addmm.default, (x(4), A, x(8, 4))), _with((R, 1, 0), (P,), 8)),
    Mutation(
        "convolution's c with a bias",
        Case(aten.convolution.default, (IMAGE, KERNEL, x(8), *PADS)),
        _with((1, 1, R), (P,), 4),
    ),
    Mutation(
        "convolution's rows",
        Case(aten.convolution.default, (x(4, 4, 4, 4), KERNEL, None, *PADS)),
        _with((2, R), (2,), 4),
    ),
    Mutation(
        "dw whole",
        Case(
            aten.convolution_backward.default,
            (x(4, 8, 5, 5), IMAGE, KERNEL, None, *PADS, [True, True, False]),
        ),
        _results("n", (0, R, R)),
    ),
    Mutation(
        "attention's sequence",
        Case(torch.ops.autopar.sdpa.default, (Q, Q, Q, None, False, 0.5)),
        _with((2, 2, 2), (2, 2), 8),
    ),
    Mutation(
        "queries under a causal mask",
        Case(torch.ops.autopar.sdpa.default, (Q, Q, Q, None, True, 0.5)),
        _with((2, R, R), (2, 2), 8),
    ),
    Mutation(
        "attention's dropout of a shard",
        Case(torch.ops.autopar.sdpa_dropout.default, (Q, Q, Q, False, 0.5, SEED, 3, 0.4, *WHOLE)),
        lowering=_as_it_is,
    ),
    Mutation(
        "attention's dropout from the shard's first query",
        Case(torch.ops.autopar.sdpa_dropout.default, (Q, Q, Q, False, 0.5, SEED, 3, 0.4, *WHOLE)),
        lowering=_queries_alone,
    ),
    Mutation("rows stay where they are", EXPERTS, _local("exchange")),
    Mutation("experts from 0", EXPERTS, lowering=_as_it_is),
    Mutation("experts elsewhere are no part of a sum", EXPERTS, _results("e", (R,))),
    Mutation("experts are linear in x", EXPERTS, _with((P, R, R, R, R), (P,))),
    Mutation("experts are linear in up", EXPERTS, _with((R, R, R, P, R), (P,))),
    Mutation("up gradient of some tokens", EXPERTS_BACKWARD, _results("t", (0, 0, R, P))),
    Mutation(
        "experts' gradients are linear in x", EXPERTS_BACKWARD, _with((R, P, R, R, R, R), (P,) * 4)
    ),
    Mutation("cat's dim", Case(aten.cat.default, ([A, B], 1)), _with((1, 1), (1,), 8)),
    Mutation("cat: one sum", Case(aten.cat.default, ([A, B], 0)), _with((P, R), (P,))),
    Mutation("cumsum's dim", Case(aten.cumsum.default, (A, 1)), _with((1,), (1,), 8)),
    Mutation("flip's dim", Case(aten.flip.default, (A, [1])), _with((1,), (1,), 8)),
    Mutation("sort's dim", Case(aten.sort.default, (A, 1)), _with((1,), (1, 1), 8)),
    Mutation("tril's dim", Case(aten.tril.default, (x(8, 8),)), _with((0,), (0,), 8)),
    Mutation(
        "gather's dim", Case(aten.gather.default, (A, 1, ints(2, 4, 8))), _with((1, 1), (1,), 8)
    ),
    Mutation("pad with 2", Case(aten.constant_pad_nd.default, (A, [1, 1], 2.0)), _with((P,), (P,))),
    Mutation(
        "last write wins",
        Case(aten.index_put.default, (A, [ints(4, 4)], x(4, 8), False)),
        _with((P, 0, 0), (P,), 4),
    ),
    Mutation(
        "view's second atom", Case(aten.view.default, (x(4, 2, 8), [8, 8])), _with((1,), (0,), 2)
    ),
    Mutation("transposed", Case(aten.t.default, (x(4, 4),)), _results("d0", (0,))),
    Mutation("squeeze of a shard", Case(aten.squeeze.dim, (x(2, 4), 0)), lowering=_as_it_is),
    Mutation(
        "dropout of a shard",
        Case(torch.ops.autopar.dropout.default, (A, SEED, 3, 0.5, [4, 8], [4, 8], [0, 0], 1)),
        lowering=_local_dropout,
    ),
    Mutation(
        "noise of a shard",
        Case(torch.ops.autopar.normal.default, (SEED, 3, [4, 8], [4, 8], [0, 0], torch.float64)),
        lowering=lambda site: site.call_with({3: site.result_shape()}),
    ),
    *(
        Mutation(f"{name}: padding is summed", case, _fill(factor, fill))
        for name, case, factor, fill in LEAKS
    ),
    Mutation(
        "zeros in a histogram",
        Case(aten.histc.default, (x(8), 4, -2, 2)),
        _uneven("d0", (0,)),
    ),
    Mutation(
        "soft margin of zeros",
        Case(aten.soft_margin_loss.default, (A, B, 2)),
        _uneven("d0", (0, 0)),
    ),
    Mutation(
        "padding adds the one value too",
        Case(aten.index_put.default, (A, [ints(4, 8)], x(8), True)),
        _uneven("i0", (None, 0, None)),
    ),
    Mutation("positions from 0", Case(aten.arange.default, (8,)), lowering=_arange_from_zero),
)


def _caught(mutation: Mutation, make_rule: Callable[[Call], Rule]) -> int:
    case = mutation.case
    sample = make_sample(case.target, case.args, case.kwargs)
    generator = torch.Generator().manual_seed(0)
    found = 0
    for mesh in (*MESHES, LogicalMesh((3,))):
        _, wrong = disagreements(sample, mesh, make_rule=make_rule, generator=generator)
        found += len(wrong)
    return found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_oracle_sees(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _caught(mutation, rule_for), "the rule is wrong without the mutation"
    if mutation.lowering is not None:
        table = {**composites.LOWERINGS, mutation.case.target: mutation.lowering}
        monkeypatch.setattr(composites, "LOWERINGS", table)
    for name, patch in (mutation.patches or {}).items():
        monkeypatch.setattr(vocabulary, name, patch)
    try:
        found = _caught(mutation, lambda call: mutation.rule(rule_for(call)))
    except (RuntimeError, IndexError):  # the shards do not even fit together
        return
    assert found
