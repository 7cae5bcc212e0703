"""Calls of the main families at any sizes of at least 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from tests.unit.sharding.case import Case, bools, ints, x

aten, own = torch.ops.aten, torch.ops.autopar


def _contraction(a: int, b: int, c: int, d: int) -> Iterator[Case]:
    yield Case(aten.mm.default, (x(a, b), x(b, c, seed=1)))
    yield Case(aten.bmm.default, (x(a, b, c), x(a, c, d, seed=1)))
    yield Case(aten.addmm.default, (x(c), x(a, b), x(b, c, seed=1)))


def _convolution(a: int, b: int, c: int, d: int) -> Iterator[Case]:
    image, kernel = x(a, b, 4), x(c, b, 3, seed=1)
    how = ([1], [1], [1], False, [0], 1)
    yield Case(aten.convolution.default, (image, kernel, None, *how))
    backward = aten.convolution_backward.default
    yield Case(backward, (x(a, c, 4), image, kernel, [c], *how, [True] * 3))
    batch_norm = (x(a, b, d), x(b), x(b, seed=1), x(b, seed=2), x(b, seed=3).exp())
    target = aten._native_batch_norm_legit_functional.default
    yield Case(target, (*batch_norm, True, 0.1, 1e-5))


def _pointwise(a: int, b: int, c: int, d: int) -> Iterator[Case]:
    yield Case(aten.add.Tensor, (x(a, b, c), x(b, 1, seed=1)))
    yield Case(aten.where.self, (bools(a, 1, c), x(a, b, c), x(c, seed=1)))
    yield Case(aten.view.default, (x(a, b, c), [a * b, c]))
    yield Case(aten.view.default, (x(a, b * c), [a, b, c]))
    yield Case(aten.permute.default, (x(a, b, c, d), [2, 0, 3, 1]))
    yield Case(aten.expand.default, (x(a, 1, c), [a, b, c]))
    seed, sizes = torch.tensor([5, 0], dtype=torch.int32), [a, b]
    dropout = torch.ops.autopar.dropout.default
    yield Case(dropout, (x(a, b), seed, 3, 0.5, sizes, sizes, [0, 0], 1))


def _reduction(a: int, b: int, c: int, _d: int) -> Iterator[Case]:
    yield Case(aten.sum.dim_IntList, (x(a, b, c), [0, 2]))
    yield Case(aten.mean.dim, (x(a, b, c), [1], True))
    yield Case(aten.mean.default, (x(a, b),))
    yield Case(aten.amax.default, (x(a, b, c), [1]))
    yield Case(aten.mse_loss.default, (x(a, b), x(a, b, seed=1)))


def _normalisation(a: int, b: int, c: int, _d: int) -> Iterator[Case]:
    yield Case(aten._softmax.default, (x(a, b, c), -1, False))
    yield Case(aten._log_softmax.default, (x(a, b, c), 1, False))
    backward = aten._log_softmax_backward_data.default
    yield Case(backward, (x(a, b), x(a, b, seed=1).log_softmax(1), 1, torch.float64))
    args = (x(a, b, c), [c], x(c), x(c, seed=1))
    yield Case(aten.native_layer_norm.default, (*args, 1e-5))
    _, mean, rstd = aten.native_layer_norm(*args, 1e-5)
    rest = (args[0], [c], mean, rstd, *args[2:], [True] * 3)
    yield Case(aten.native_layer_norm_backward.default, (x(a, b, c, seed=5), *rest))


def _vocabulary(a: int, b: int, c: int, d: int) -> Iterator[Case]:
    tokens = ints(d, a, b)
    yield Case(aten.embedding.default, (x(d, c), tokens))
    yield Case(aten.embedding_dense_backward.default, (x(a, b, c), tokens, d, -1, False))
    scores, target = x(a, d).log_softmax(1), ints(d, a)
    target[0] = -100
    for reduction in (0, 2):
        args = (scores, target, None, reduction, -100)
        yield Case(aten.nll_loss_forward.default, args)
        count = aten.nll_loss_forward(*args)[1]
        grad = x(a, seed=5) if reduction == 0 else x(seed=5)
        yield Case(aten.nll_loss_backward.default, (grad, *args, count))
    entropy = (x(a, d), target, -100)
    yield Case(own.cross_entropy.default, entropy)
    lse = own.cross_entropy(*entropy)[2]
    yield Case(own.cross_entropy_backward.default, (x(seed=5), *entropy[:2], lse, -100, 0))
    yield Case(aten.gather.default, (x(a, d), 1, ints(d, a, c)))
    yield Case(aten.scatter_add.default, (x(a, d), 1, ints(d, a, c), x(a, c, seed=1)))


def _attention(a: int, b: int, c: int, d: int) -> Iterator[Case]:
    q, k, v = (x(a, b, c, d, seed=seed) for seed in range(3))
    yield Case(torch.ops.autopar.sdpa.default, (q, k, v, None, True, 0.5))
    out, lse = torch.ops.autopar.sdpa(q, k, v, None, True, 0.5)
    args = (x(a, b, c, d, seed=4), q, k, v, None, out, lse, True, 0.5)
    yield Case(torch.ops.autopar.sdpa_backward.default, args)
    seed = torch.tensor([5, 1], dtype=torch.int32)
    rest = (True, 0.5, seed, 3, 0.4, [a, b, c], [0, 0, 0])
    yield Case(own.sdpa_dropout.default, (q, k, v, *rest))
    args = (x(a, b, c, d, seed=4), q, k, v, *own.sdpa_dropout(q, k, v, *rest), *rest)
    yield Case(own.sdpa_dropout_backward.default, args)


FAMILIES: Mapping[str, Callable[[int, int, int, int], Iterator[Case]]] = {
    "contraction": _contraction,
    "convolution": _convolution,
    "pointwise": _pointwise,
    "reduction": _reduction,
    "normalisation": _normalisation,
    "vocabulary": _vocabulary,
    "attention": _attention,
}
