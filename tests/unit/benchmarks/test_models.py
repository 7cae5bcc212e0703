"""Benchmark models train, are deterministic, and have the published sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import MODELS, gpt, llama, moe, t5
from tests.zoo import FAMILIES, SIZES, ZOO
from tests.zoo.rows import ROWS

TINY = sorted(name for name in MODELS if name.endswith("-tiny"))
# Published parameter counts, in millions, with their source.
PUBLISHED_MILLIONS = {
    "gpt-124m": 124.4,  # GPT-2 small, tied
    "gpt-1.3b": 1300,  # Alpa, table 5
    "gpt-2.6b": 2600,
    "gpt-39b": 39000,
    "llama-3-8b": 8030.3,  # model card
    "llama-8l": 8030.3 - 24 * 218.1,
    "llama-24l": 8030.3 - 8 * 218.1,
    "moe-380m": 380,  # Alpa, table 6
    "moe-2.4b": 2400,
    "wresnet-250m": 250,  # Alpa, table 7
    "wresnet-1b": 1000,
    "t5-large": 737.7,  # the released checkpoint
    "dlrm-criteo": 24035.4,  # 187,767,399 rows of 128, and the perceptrons
    "unet-860m": 859.5,  # Stable Diffusion 1.x
}


def _step(module: nn.Module, batch: Any) -> Tensor:
    """Loss of one forward under seed 1, gradients left in the parameters."""
    torch.manual_seed(1)
    outputs = module(**batch) if isinstance(batch, dict) else module(*batch)
    loss = outputs if isinstance(outputs, Tensor) else outputs.loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo_model_trains_and_is_deterministic(name: str) -> None:
    (module, batch), (again, batch_again) = ZOO[name](), ZOO[name]()
    loss = _step(module, batch)
    assert module.training
    assert loss.dim() == 0 and math.isfinite(loss)
    without_gradient = [
        n
        for n, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without_gradient == []
    assert torch.equal(loss, _step(again, batch_again))
    for first, second in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo_factory_leaves_the_random_state(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ZOO[name]()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(n for n, m in ZOO.items() if m.equal_rows))
def test_mean_over_microbatches_is_the_loss_of_the_batch(name: str) -> None:
    module, batch = ZOO[name]()
    module.eval().double()

    def loss_of(rows: slice) -> Tensor:
        if isinstance(batch, dict):
            return _step(module, {key: _double(t)[rows] for key, t in batch.items()})
        return _step(module, tuple(_double(t)[rows] for t in batch))

    halves = (loss_of(slice(0, 4)) + loss_of(slice(4, 8))) / 2
    torch.testing.assert_close(halves, loss_of(slice(0, 8)), rtol=1e-6, atol=0)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_trains_and_is_deterministic(name: str) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        case = MODELS[name]
        module, batch = case.build(), case.batch(8)
        losses.append(_step(module, batch))
    assert losses[0].dim() == 0 and math.isfinite(losses[0])
    assert torch.equal(losses[0], losses[1])
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", sorted(PUBLISHED_MILLIONS))
def test_named_size_has_the_published_parameters(name: str) -> None:
    with torch.device("meta"):
        module = MODELS[name].build()
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLIONS[name], rel=0.025)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_published_size_of_the_zoo(name: str) -> None:
    with torch.device("meta"):
        module, batch = SIZES[name]()
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    published = next(row.sizes[name].millions for row in FAMILIES.values() if name in row.sizes)
    assert millions == pytest.approx(published, rel=0.005)
    assert all(len(t) == ROWS for t in batch.values() if isinstance(t, Tensor))


def test_every_named_size_is_either_tiny_or_published() -> None:
    assert set(MODELS) == set(TINY) | set(PUBLISHED_MILLIONS)


def _counted_flops(name: str) -> float:
    """Forward and backward FLOPs of one sample of matmuls and convolutions, by torch's counter."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        MODELS[name].build()(*(t.to("meta") for t in MODELS[name].batch(1)))
    return 3.0 * counter.get_total_flops()


def test_flops_formulas_agree_with_torchs_counter() -> None:
    """Torch counts causal attention whole; the formulas take its half."""
    g, ll, s = gpt.CONFIGS["gpt-124m"], llama.CONFIGS["llama-8l"], t5.CONFIGS["t5-large"]
    other_half = {
        "gpt-124m": 6 * g.num_layers * g.seq_len**2 * g.hidden,
        "llama-8l": 6 * ll.num_layers * ll.seq_len**2 * ll.hidden,
        "t5-large": 6 * s.num_layers * s.target_len**2 * s.num_heads * s.head_size,
        "wresnet-250m": 0,
    }
    for name, uncounted in other_half.items():
        ours = MODELS[name].model_flops_per_sample() + uncounted
        assert ours == pytest.approx(_counted_flops(name), rel=1e-6), name


def test_every_token_reaches_two_experts_or_is_dropped() -> None:
    """With room for all, a token's weights sum to one over two slots; a slot holds one token."""
    torch.manual_seed(0)
    batch, seq_len, num_experts = 3, 16, 4
    probability = torch.randn(batch, seq_len, num_experts).softmax(-1)
    combine, balance = moe.top2_gating(probability, capacity=seq_len)
    torch.testing.assert_close(combine.sum(dim=(2, 3)), torch.ones(batch, seq_len))
    assert ((combine > 0).sum(dim=(2, 3)) == 2).all()
    assert ((combine > 0).sum(dim=1) <= 1).all()
    assert balance > 0

    tight, _ = moe.top2_gating(probability, capacity=2)
    assert tight.shape[-1] == 2
    assert ((tight > 0).sum(dim=1) <= 1).all()
    assert tight.sum() < combine.sum()


def test_t5_buckets_match_the_reference_values() -> None:
    """Near distances are exact, the last bucket takes the rest, the encoder tells the direction."""
    config = t5.CONFIGS["t5-large"]
    causal = t5.position_buckets(200, config, causal=True, device=torch.device("cpu"))
    assert causal[15, :16].tolist() == list(range(15, -1, -1))
    assert causal[199, 0] == 31 and causal[0, 199] == 0
    both = t5.position_buckets(200, config, causal=False, device=torch.device("cpu"))
    assert both[0, 3] == 16 + 3 and both[3, 0] == 3
    assert both[0, 199] == 31 and both[199, 0] == 15


@pytest.mark.parametrize("name", TINY)
def test_no_buffer_is_needed_after_meta(name: str) -> None:
    """A module built on meta and filled with weights is complete: no constant buffer is lost."""
    with torch.device("meta"):
        lost = MODELS[name].build()
    names = {n for n, _ in lost.named_buffers()} - set(lost.state_dict())
    assert names == set()
