"""Compiled steps against interpreted ones on two GPUs, at widths at which Inductor writes the
kernels that real models get: small ones are summed, joined and tiled in other ways."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.api import parallelize
from autopar.options import SearchOptions
from autopar.runtime.comm import World
from autopar.runtime.launch import run_processes
from benchmarks.models import gpt, llama, moe, t5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# Of the norm, in float32: rounding makes up to 1.3e-4 of it, in T5, whose scores are not scaled.
LIMIT = 1e-3

# A model, its sizes, where batches come from, and rows of a batch.
MODELS: dict[str, tuple[Any, Any, Any, int]] = {
    "gpt": (gpt.GPT, gpt.GPTConfig(1024, 3, 16, vocab_size=1024, seq_len=1024), gpt, 16),
    "llama": (llama.Llama, llama.LlamaConfig(1024, 2048, 2, 16, 4, 1024, 2048), llama, 8),
    "moe": (moe.MoE, moe.MoEConfig(1024, 4, 16, 8, 2048, vocab_size=1024), moe, 16),
    "t5": (t5.T5, t5.T5Config(512, 1024, 2, 8, vocab_size=1024), t5, 32),
}


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """On the CPU, the same on every rank."""
    factory, config, module, rows = MODELS[name]
    torch.manual_seed(0)
    return factory(config), module.example_batch(config, rows)


def gradients(world: World, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the compiled and of the interpreted step: the loss, and each parameter's shard."""
    options = SearchOptions(num_stages=1, num_microbatches=1)
    plan, found = None, []
    for compiled in (True, False):
        model, batch = make(name)
        parallel = parallelize(
            model,
            batch,
            cluster=f"h100:1x{world.size}",
            plan=plan,
            options=options,
            compiled=compiled,
        )
        plan = parallel.plan
        loss = parallel.train_step(batch)
        shards = {"loss": loss.detach().cpu()}
        for key, parameter in parallel.named_parameters():
            grad = parameter.grad
            assert grad is not None, key
            shards[key] = getattr(grad, "to_local", lambda grad=grad: grad)().cpu()
        found.append(shards)
    return found[0], found[1]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_equal_interpreted_ones(name: str) -> None:
    for got, want in run_processes(
        gradients, 2, name, device_type="cuda", timeout=timedelta(seconds=120)
    ):
        errors = {key: float((got[key] - want[key]).norm() / want[key].norm()) for key in want}
        wrong = {key: error for key, error in errors.items() if not error <= LIMIT}
        assert not wrong, wrong
