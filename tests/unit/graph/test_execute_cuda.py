"""A graph captured on fake CPU tensors runs on CUDA."""

from __future__ import annotations

import pytest
import torch

from autopar.graph.capture import capture_graph
from tests.unit.graph import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_cuda_equals_cpu(name: str) -> None:
    model, batch = zoo.build(name)
    graph = capture_graph(model, batch)
    want = zoo.named_outputs(graph, model, batch)
    got = zoo.named_outputs(graph, model.cuda(), batch)
    scale = max(float(value.abs().max()) for value in want.values())
    for key, value in want.items():
        torch.testing.assert_close(got[key].cpu(), value, rtol=1e-6, atol=1e-6 * scale)


def test_dropout_masks_are_those_of_the_cpu() -> None:
    x = torch.randn(64, 32)
    seed = torch.tensor([5, 0], dtype=torch.int32)
    args = (3, 0.3, (64, 32), (64, 32), (0, 0), 1)
    want = torch.ops.autopar.dropout(x, seed, *args)
    got = torch.ops.autopar.dropout(x.cuda(), seed.cuda(), *args)
    assert torch.equal(got.cpu(), want)


def test_model_on_cuda_is_captured_like_one_on_the_cpu() -> None:
    model, batch = zoo.build("gpt2")
    want = capture_graph(model, batch).fingerprint()
    cuda = {key: value.cuda() for key, value in batch.items()}
    assert capture_graph(model.cuda(), cuda).fingerprint() == want
