"""What our own operators are for a compiler: plain ATen where it can fuse, the fastest kernel where
it cannot.

    convolutions                                          of operands with channels last
    gelu, by tanh                                         a sigmoid
    gradient of an embedding of a few rows                a sum for each row
    mean and variance of channels                         two sums of one pass
    max_pool                                              Inductor's own
    max_pool_backward                                     one operator, for which Inductor has our
                                                          loops (`compile.pooling`)
    a sum with a factor (alpha)                           a product and a sum: Inductor's product of
                                                          matrices with a bias loses the factor
                                                          (torch 2.13)
    dropout                                               one operator with its keys, for which
                                                          Inductor has our loop (`compile.noise`)
    aligned_product                                       a slice of a padded product
    linear_gelu, gelu_gradient                            cuBLASLt's, if it has a kernel for them;
                                                          else their own ATen bodies
    uniform, normal, .., padded_narrow, keep_on_first,
    cross_entropy                                         their own ATen bodies
    its passes over the scores, on CUDA                   our kernels, if they take the rows; else
                                                          their own ATen bodies
    sdpa on CUDA                                          cuDNN's or flash attention, if it takes
                                                          the call; else its own body
    sdpa_dropout on CUDA                                  our kernel, one operator, if it takes the
                                                          call; else its own ATen body
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopar.compile.activations import gelu, gelu_backward
from autopar.compile.alignment import aligned_product
from autopar.compile.convolutions import ChannelsLast
from autopar.compile.embeddings import embedding_backward
from autopar.compile.moments import var_mean
from autopar.compile.pooling import max_pool
from autopar.ops.attention import sdpa_backward_fused, sdpa_fused
from autopar.ops.attention_dropout import (
    Dropout,
    has_kernel_for,
    sdpa_dropout_backward_math,
    sdpa_dropout_math,
)
from autopar.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_rows,
    has_kernel_for_rows,
    softmax_sums,
)
from autopar.ops.epilogues import (
    gelu_gradient,
    gelu_gradient_problem,
    linear_gelu,
    linear_gelu_problem,
)
from autopar.ops.padding import padded_narrow
from autopar.ops.partial import keep_on_first
from autopar.ops.random import counter_dropout, counter_normal, counter_randint, counter_uniform

aten, own = torch.ops.aten, torch.ops.autopar

Decompositions = Mapping[Any, Callable[..., Any]]


def decompositions(random_op_ids: Sequence[int]) -> dict[Any, Callable[..., Any]]:
    """Inductor's, and those of our operators, by overload, for one program. random_op_ids: of its
    random operators."""
    from torch._inductor import lowering  # noqa: F401  (some decompositions ask it)
    from torch._inductor.decomposition import select_decomp_table

    keys = _KeyTable(random_op_ids)
    random = {target: partial(body, keys=keys) for target, body in _RANDOM.items()}
    drop = partial(_dropout, keys)
    dropout: Decompositions = {
        own.dropout.default: drop,
        own.sdpa_dropout.default: partial(_sdpa_dropout, drop),
        own.sdpa_dropout_backward.default: partial(_sdpa_dropout_backward, drop),
    }
    table, images = select_decomp_table(), ChannelsLast()
    gradient = aten.convolution_backward.default
    of_images: Decompositions = {
        aten.convolution.default: images.forward,
        gradient: partial(images.backward, table[gradient]),
        aten.var_mean.correction: var_mean,
    }
    better: Decompositions = {
        target: partial(body, table[target]) for target, body in _BETTER.items()
    }
    return {**table, **of_images, **better, **_OWN, **random, **dropout}


def _dropout(keys: _KeyTable, x: Tensor, seed: Tensor, op_id: int, p: float, *rest: Any) -> Tensor:
    if not 0.0 < p < 1.0:
        return counter_dropout(x, seed, op_id, p, *rest)
    dropped: Tensor = own.keyed_dropout(x, seed, *keys.row(seed, op_id), p, *rest)
    return dropped


def _sum(x: Tensor, y: Tensor, *, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else aten.add.Tensor(x, aten.mul.Tensor(y, alpha))


def _sdpa(*args: Any) -> Any:
    found = sdpa_fused(*args)
    return NotImplemented if found is None else found


def _sdpa_backward(*args: Any) -> Any:
    found = sdpa_backward_fused(*args)
    return NotImplemented if found is None else found


def _softmax_sums(x: Tensor) -> Any:
    return NotImplemented if has_kernel_for_rows(x) else softmax_sums(x)


def _cross_entropy_backward(grad: Tensor, x: Tensor, *rest: Any) -> Any:
    return NotImplemented if has_kernel_for_rows(x) else cross_entropy_backward(grad, x, *rest)


def _cross_entropy_rows(grad: Tensor, x: Tensor, *rest: Any) -> Any:
    return NotImplemented if has_kernel_for_rows(x) else cross_entropy_rows(grad, x, *rest)


def _linear_gelu(a: Tensor, b: Tensor, bias: Tensor, choice: int) -> Any:
    has_kernel = linear_gelu_problem(a, b, bias) is not None
    return NotImplemented if has_kernel else linear_gelu(a, b, bias, choice)


def _gelu_gradient(a: Tensor, b: Tensor, x: Tensor, choice: int) -> Any:
    has_kernel = gelu_gradient_problem(a, b, x) is not None
    return NotImplemented if has_kernel else gelu_gradient(a, b, x, choice)


def _sdpa_dropout(drop: Dropout, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    if not has_kernel_for(q, k, v, p=rest[4]):
        return sdpa_dropout_math(q, k, v, *rest, dropout=drop)
    out, lse = own.flash_dropout(q, k, v, *rest)
    return out.transpose(1, 2), lse


def _sdpa_dropout_backward(
    drop: Dropout, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Any:
    if not has_kernel_for(q, k, v, p=rest[6]):
        return sdpa_dropout_backward_math(dout, q, k, v, *rest, dropout=drop)
    grads = own.flash_dropout_backward(dout, q, k, v, *rest)
    return tuple(grad.transpose(1, 2) for grad in grads)


class _KeyTable:
    """Keys of all random operators of a program, made by one call: hashed where they are needed,
    they would be computed anew for every element."""

    def __init__(self, op_ids: Sequence[int]) -> None:
        self._rows = {op_id: row for row, op_id in enumerate(dict.fromkeys(op_ids))}
        self._seed: Tensor | None = None
        self._keys: Tensor | None = None

    def __call__(self, seed: Tensor, op_id: int) -> tuple[Tensor, Tensor]:
        keys, row = self.row(seed, op_id)
        return keys[row, :1], keys[row, 1:]

    def row(self, seed: Tensor, op_id: int) -> tuple[Tensor, int]:
        """The table, and which of its rows."""
        if self._keys is None or self._seed is not seed:
            self._seed, self._keys = seed, own.random_keys(seed, list(self._rows))
        return self._keys, self._rows[op_id]


_BETTER: Decompositions = {  # given Inductor's
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten.embedding_dense_backward.default: embedding_backward,
}
_RANDOM: Decompositions = {
    own.uniform.default: counter_uniform,
    own.normal.default: counter_normal,
    own.randint.default: counter_randint,
}
_OWN: Decompositions = {
    aten.add.Tensor: _sum,
    own.padded_narrow.default: padded_narrow,
    own.aligned_product.default: aligned_product,
    own.keep_on_first.default: keep_on_first,
    own.max_pool.default: max_pool,
    own.cross_entropy.default: cross_entropy,
    own.softmax_sums.default: _softmax_sums,
    own.cross_entropy_backward.default: _cross_entropy_backward,
    own.cross_entropy_rows.default: _cross_entropy_rows,
    own.linear_gelu.default: _linear_gelu,
    own.gelu_gradient.default: _gelu_gradient,
    own.sdpa.default: _sdpa,
    own.sdpa_backward.default: _sdpa_backward,
}
