"""The kernel of `autopar::flash_dropout` against explicit attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import autopar.ops  # noqa: F401
from autopar.compile.inductor import compile_module
from autopar.compile.kernels import decompositions
from autopar.ops.attention_dropout import (
    has_kernel_for,
    sdpa_dropout_backward_math,
    sdpa_dropout_math,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

own = torch.ops.autopar
SCALE, OP_ID = 0.125, 7
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm
WHOLE = [0, 0, 0]


def seed() -> Tensor:
    return torch.tensor([-123456789, 3], dtype=torch.int32, device="cuda")


def operands(
    heads: int, groups: int, queries: int, keys: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """dout, q, k, v, as a projection leaves them: heads next to one another."""
    generator = torch.Generator(device="cuda").manual_seed(queries)

    def made(count: int, heads: int) -> Tensor:
        x = torch.randn(2, count, heads, width, device="cuda", generator=generator)
        return x.to(dtype).transpose(1, 2)

    return [made(queries, heads), made(queries, heads), made(keys, groups), made(keys, groups)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "width"),
    [
        (3, 3, 512, 512, 64),
        (4, 2, 333, 333, 128),
        (2, 1, 77, 200, 64),
        (2, 2, 300, 131, 40),
        (1, 1, 1, 5, 16),
    ],
)
def test_it_is_exact_to_rounding(
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype,
    causal: bool,
    p: float,
) -> None:
    dout, q, k, v = operands(heads, groups, queries, keys, width, dtype)
    rest = (causal, SCALE, seed(), OP_ID, p, [2, heads, queries], WHOLE)
    wide = [t.double() for t in (dout, q, k, v)]
    assert has_kernel_for(q, k, v, p) == (p > 0)
    want, want_lse = sdpa_dropout_math(*wide[1:], *rest)
    out, lse = own.sdpa_dropout(q, k, v, *rest)
    assert out.is_contiguous()
    assert error(out, want) < LIMIT[dtype]
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    grads = own.sdpa_dropout_backward(dout, q, k, v, out, lse, *rest)
    wants = sdpa_dropout_backward_math(*wide, want, want_lse, *rest)
    for grad, reference in zip(grads, wants, strict=True):
        assert grad.is_contiguous() and grad.dtype == dtype
        if queries > 1 or not causal:  # one query that sees one key: dq and dk are rounding
            assert error(grad, reference) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("sizes", [[2, 4, 128], [40000, 4001, 1024]])
@pytest.mark.parametrize("offsets", [[0, 0, 0], [0, 2, 64], [31, 7, 5]])
def test_masks_are_those_of_dropout(sizes: list[int], offsets: list[int]) -> None:
    """Where each key's value is a column of its own, out shows the mask, and dv that of backward.
    Where all of v is alike and each query and key a column of its own, dq and dk are positive where
    a probability is kept."""
    eye = torch.eye(128, device="cuda", dtype=torch.float16).expand(2, 2, 128, 128)
    first = torch.zeros_like(eye)
    first[..., 0] = 1
    rest = (False, SCALE, seed(), OP_ID, 0.3, sizes, offsets)
    local = [2, 2, 128, 128]
    ones = torch.ones(local, device="cuda")
    mask = own.dropout(ones, seed(), OP_ID, 0.3, [*sizes, 128], local, [*offsets, 0], 3) != 0
    out, lse = own.flash_dropout(eye, eye, eye, *rest)
    dv = own.flash_dropout_backward(eye, eye, eye, eye, out.transpose(1, 2), lse, *rest)[2]
    assert torch.equal(out.transpose(1, 2) != 0, mask)
    assert torch.equal(dv.permute(0, 2, 3, 1) != 0, mask)
    out, lse = own.flash_dropout(eye, eye, first, *rest)
    saved = (first, eye, eye, first, out.transpose(1, 2), lse)
    dq, dk, _ = own.flash_dropout_backward(*saved, *rest)
    assert torch.equal(dq.transpose(1, 2) > 0, mask)
    assert torch.equal(dk.permute(0, 2, 3, 1) > 0, mask)


def test_shards_of_the_queries_are_slices_of_the_whole() -> None:
    dout, q, k, v = operands(2, 2, 400, 400, 64, torch.bfloat16)
    rest: tuple[Any, ...] = (True, SCALE, seed(), OP_ID, 0.1, [2, 2, 400])
    out, lse = own.sdpa_dropout(q, k, v, *rest, WHOLE)
    dq, dk, dv = own.sdpa_dropout_backward(dout, q, k, v, out, lse, *rest, WHOLE)
    parts = []
    for start, stop in ((0, 130), (130, 400)):
        cut = [t[:, :, start:stop] for t in (dout, q)]
        saved = own.sdpa_dropout(cut[1], k, v, *rest, [0, 0, start])
        grads = own.sdpa_dropout_backward(*cut, k, v, *saved, *rest, [0, 0, start])
        parts.append((*saved, *grads))
    for index, whole in enumerate((out, lse, dq)):
        joined = torch.cat([part[index] for part in parts], 2)
        assert error(joined, whole.double()) < 1e-2
    for index, whole in ((3, dk), (4, dv)):
        assert error(parts[0][index] + parts[1][index], whole.double()) < 2e-2


def attended(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> list[Tensor]:
    rest = (True, SCALE, seed, OP_ID, 0.1, [2, 4, 96], WHOLE)
    out, lse = own.sdpa_dropout(q * 1, k, v, *rest)
    grads = own.sdpa_dropout_backward(dout * 2, q * 1, k, v, out, lse, *rest)
    return [out.transpose(1, 2).flatten(2) + 1, lse, *grads]


def test_compiled_code_calls_it() -> None:
    inputs = [*operands(4, 2, 96, 96, 64, torch.bfloat16), seed()]
    with torch.no_grad():
        module = make_fx(
            attended, tracing_mode="fake", decomposition_table=decompositions([OP_ID])
        )(*inputs)
    targets = [node.target for node in module.graph.nodes]
    assert own.flash_dropout.default in targets and own.flash_dropout_backward.default in targets
    for one, other in zip(
        compile_module(module).call(list(inputs)), attended(*inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
