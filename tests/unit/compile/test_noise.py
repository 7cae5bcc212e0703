"""Dropout in Inductor's loops drops what the operator drops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.compile import kernels
from autopar.compile.inductor import compile_module
from autopar.compile.kernels import decompositions
from tests.devices import DEVICES

dropout = torch.ops.autopar.dropout.default


def dropped(x: Tensor, y: Tensor, z: Tensor, seed: Tensor) -> list[Tensor]:
    """Atoms that are not dims; no rows; rows and columns beyond 2^31 of them."""
    return [
        dropout(x, seed, 5, 0.3, [8, 4, 6, 32], [4, 4, 3, 32], [4, 0, 3, 0], 3),
        dropout(y, seed, 7, 0.1, [64, 300], [16, 300], [16, 0], 0).relu(),
        dropout(z, seed, 9, 0.9, [64, 70000, 70000], [2, 32, 16], [62, 69000, 4001], 1),
        dropout(y, seed, 8, 0.0, [64, 300], [16, 300], [16, 0], 1),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_elements(device: str) -> None:
    seed = torch.tensor([-9, 3], dtype=torch.int32, device=device)
    x, y = torch.randn(16, 3, 32, device=device), torch.randn(16, 300, device=device)
    z = torch.randn(2, 32, 16, device=device, dtype=torch.float64)
    inputs = [x, y, z, seed]
    with torch.no_grad():
        module = make_fx(
            dropped, tracing_mode="fake", decomposition_table=decompositions([5, 7, 9])
        )(*inputs)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(torch.ops.autopar.keyed_dropout.default) == 3
    want = dropped(*inputs)
    for got in (module(*inputs), compile_module(module).call(list(inputs))):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one == 0, other == 0)
            torch.testing.assert_close(one, other)


def attended(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seed: Tensor) -> list[Tensor]:
    """A shard of the heads and queries."""
    own, mask = torch.ops.autopar, (seed, 5, 0.3, [4, 8, 12], [2, 4, 6])
    out, lse = own.sdpa_dropout(q, k, v, True, 0.5, *mask)
    return [out, lse, *own.sdpa_dropout_backward(dout, q, k, v, out, lse, True, 0.5, *mask)]


@pytest.mark.parametrize("kernel", [False, True])
def test_the_same_probabilities(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out, or by the operator that stands for a kernel."""
    monkeypatch.setattr(kernels, "has_kernel_for", lambda *_args, p: kernel)
    seed = torch.tensor([-9, 3], dtype=torch.int32)
    q, dout = torch.randn(2, 2, 4, 6, 8).unbind()
    k, v = torch.randn(2, 2, 2, 12, 8).unbind()
    inputs = [q, k, v, dout, seed]
    with torch.no_grad():
        module = make_fx(attended, tracing_mode="fake", decomposition_table=decompositions([5]))(
            *inputs
        )
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(torch.ops.autopar.keyed_dropout.default) == (0 if kernel else 3)
    assert targets.count(torch.ops.autopar.random_keys.default) == (0 if kernel else 1)
    assert targets.count(torch.ops.autopar.flash_dropout.default) == kernel
    assert targets.count(torch.ops.autopar.flash_dropout_backward.default) == kernel
    for got in (module(*inputs), compile_module(module).call(list(inputs))):
        for one, other in zip(got, attended(*inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_registration() -> None:
    x, seed = torch.randn(4, 6), torch.tensor([1, 0], dtype=torch.int32)
    keys = torch.tensor([[3, 4], [5, 6]], dtype=torch.int32)
    args = (x, seed, keys, 1, 0.5, [4, 6], [4, 6], [0, 0], 1)
    torch.library.opcheck(torch.ops.autopar.keyed_dropout.default, args)
