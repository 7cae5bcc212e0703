"""T5 1.0 encoder-decoder: relative position bias, RMSNorm, ReLU, tied embedding (Raffel, 2020).

``T5(config)(source_BS, target_BT)`` is the mean cross-entropy of the targets, which the decoder
reads shifted right by one. The embedding serves encoder, decoder and head.
B batch, S source and T target length, Q query and K key positions, H hidden, N heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class T5Config:
    """Sizes of a T5: ``num_layers`` in the encoder and as many in the decoder."""

    hidden: int
    feed_forward: int
    num_layers: int
    num_heads: int
    head_size: int = 64
    vocab_size: int = 32128
    source_len: int = 512
    target_len: int = 512
    num_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.1


# t5-large: the published 770M configuration.
CONFIGS: Mapping[str, T5Config] = MappingProxyType(
    {
        "t5-tiny": T5Config(
            64, 128, 2, 4, head_size=16, vocab_size=128, source_len=16, target_len=16
        ),
        "t5-large": T5Config(1024, 4096, 24, 16),
    }
)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean of squares in float32 or wider."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * scale).to(x.dtype)


def position_buckets(
    length: int, config: T5Config, *, causal: bool, device: torch.device
) -> Tensor:
    """[Q, K] bucket of each key's distance: exact when near, logarithmic up to ``max_distance``.

    The encoder halves the buckets between keys before and after; the decoder sees no later key.
    """
    position = torch.arange(length, device=device)
    offset_QK = position[None, :] - position[:, None]
    if causal:
        num_buckets, first_QK = config.num_buckets, torch.zeros_like(offset_QK)
        distance_QK = (-offset_QK).clamp(min=0)
    else:
        num_buckets = config.num_buckets // 2
        first_QK, distance_QK = (offset_QK > 0).long() * num_buckets, offset_QK.abs()
    num_exact = num_buckets // 2
    octaves_QK = torch.log(distance_QK.clamp(min=1) / num_exact) / math.log(
        config.max_distance / num_exact
    )
    far_QK = num_exact + (octaves_QK * (num_buckets - num_exact)).long()
    far_QK = far_QK.clamp(max=num_buckets - 1)
    return first_QK + torch.where(distance_QK < num_exact, distance_QK, far_QK)


class Attention(nn.Module):
    """Unscaled multi-head attention of ``x`` on ``memory``, without biases in its projections."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden, inner, bias=False)
        self.key = nn.Linear(config.hidden, inner, bias=False)
        self.value = nn.Linear(config.hidden, inner, bias=False)
        self.out = nn.Linear(inner, config.hidden, bias=False)
        nn.init.normal_(self.query.weight, std=(config.hidden * config.head_size) ** -0.5)
        for linear in (self.key, self.value):
            nn.init.normal_(linear.weight, std=config.hidden**-0.5)
        nn.init.normal_(self.out.weight, std=inner**-0.5)

    def _heads(self, x_BSH: Tensor) -> Tensor:
        return x_BSH.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def forward(self, x_BQH: Tensor, memory_BKH: Tensor, bias_1NQK: Tensor | None) -> Tensor:
        y_BNQD = F.scaled_dot_product_attention(
            self._heads(self.query(x_BQH)),
            self._heads(self.key(memory_BKH)),
            self._heads(self.value(memory_BKH)),
            attn_mask=bias_1NQK,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        return self.out(y_BNQD.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(relu(up(x)))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.up.weight, std=config.hidden**-0.5)
        nn.init.normal_(self.down.weight, std=config.feed_forward**-0.5)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(self.dropout(F.relu(self.up(x_BSH))))


class Block(nn.Module):
    """Self-attention, attention on the encoder's output (decoder only), feed-forward; pre-norm."""

    def __init__(self, config: T5Config, *, reads_memory: bool) -> None:
        super().__init__()
        self.norm_self = RMSNorm(config.hidden)
        self.self_attention = Attention(config)
        if reads_memory:
            self.norm_cross = RMSNorm(config.hidden)
            self.cross_attention = Attention(config)
        self.norm_mlp = RMSNorm(config.hidden)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSH: Tensor, bias_1NSS: Tensor, memory_BKH: Tensor | None) -> Tensor:
        h_BSH = self.norm_self(x_BSH)
        x_BSH = x_BSH + self.dropout(self.self_attention(h_BSH, h_BSH, bias_1NSS))
        if memory_BKH is not None:
            h_BSH = self.norm_cross(x_BSH)
            x_BSH = x_BSH + self.dropout(self.cross_attention(h_BSH, memory_BKH, None))
        return x_BSH + self.dropout(self.mlp(self.norm_mlp(x_BSH)))


class Stack(nn.Module):
    """Encoder, or decoder if ``causal``: blocks that share one relative position bias."""

    def __init__(self, config: T5Config, *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.relative_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(
            Block(config, reads_memory=causal) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.relative_bias.weight, std=config.hidden**-0.5)

    def _bias(self, x_BSH: Tensor) -> Tensor:
        """[1, N, S, S], added to the attention scores; -inf (as the dtype has it) where masked."""
        length, device = x_BSH.shape[1], x_BSH.device
        bucket_SS = position_buckets(length, self.config, causal=self.causal, device=device)
        bias_1NSS = self.relative_bias(bucket_SS).permute(2, 0, 1)[None]
        if not self.causal:
            return bias_1NSS
        position = torch.arange(length, device=device)
        later_SS = position[None, :] > position[:, None]
        return bias_1NSS.masked_fill(later_SS, torch.finfo(bias_1NSS.dtype).min)

    def forward(self, x_BSH: Tensor, memory_BKH: Tensor | None = None) -> Tensor:
        x_BSH = self.dropout(x_BSH)
        bias_1NSS = self._bias(x_BSH)
        for block in self.blocks:
            x_BSH = block(x_BSH, bias_1NSS, memory_BKH)
        return self.dropout(self.norm(x_BSH))


class T5(nn.Module):
    """Sequence-to-sequence language model with its loss."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.encoder = Stack(config, causal=False)
        self.decoder = Stack(config, causal=True)
        self.logit_scale = config.hidden**-0.5

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        memory_BSH = self.encoder(self.embedding(source_BS))
        shifted_BT = F.pad(target_BT[:, :-1], (1, 0))  # id 0 is T5's padding and start token
        x_BTH = self.decoder(self.embedding(shifted_BT), memory_BSH)
        logits_BTV = F.linear(x_BTH * self.logit_scale, self.embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())


def example_batch(
    config: T5Config, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random (source_BS, target_BT), int64."""
    source_BS = torch.randint(config.vocab_size, (batch_size, config.source_len), device=device)
    return source_BS, torch.randint(
        config.vocab_size, (batch_size, config.target_len), device=device
    )


def flops_per_sample(config: T5Config) -> float:
    """Model FLOPs of one pair of sequences, forward and backward, nothing recomputed.

    6 FLOP per token and matmul weight, cross-attention's key and value on source tokens; attention
    12 L Q K N D, halved where it is causal (PaLM's convention).
    """
    hidden, inner, layers = config.hidden, config.num_heads * config.head_size, config.num_layers
    source, target = config.source_len, config.target_len
    projection, mlp = hidden * inner, 2 * hidden * config.feed_forward
    encoder_weights = source * layers * (4 * projection + mlp)
    decoder_weights = target * layers * (6 * projection + mlp) + source * layers * 2 * projection
    head_weights = target * hidden * config.vocab_size
    attention = 12 * layers * inner * (source**2 + target**2 / 2 + source * target)
    return 6 * (encoder_weights + decoder_weights + head_weights) + attention
