"""Llama decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Grattafiori, 2024).

``Llama(config)(tokens_BS, targets_BS)`` is the mean cross-entropy over all tokens.
B batch, S sequence, H hidden, F feed-forward, N query and K key heads, D head size, V vocabulary.
Rotary angles are computed in each forward: a module built on ``meta`` has no buffer to lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes of a Llama."""

    hidden: int
    feed_forward: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    seq_len: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.num_heads):
            raise ValueError(
                f"hidden {self.hidden} does not split into {self.num_heads} even heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )

    @property
    def head_size(self) -> int:
        return self.hidden // self.num_heads


# llama-3-8b: the published model card. llama-8l, llama-24l: as many of its layers at half
# the length, for a pair of GPUs.
CONFIGS: Mapping[str, LlamaConfig] = MappingProxyType(
    {
        "llama-tiny": LlamaConfig(64, 128, 4, 8, 4, vocab_size=128, seq_len=16),
        "llama-8l": LlamaConfig(4096, 14336, 8, 32, 8, vocab_size=128256, seq_len=4096),
        "llama-24l": LlamaConfig(4096, 14336, 24, 32, 8, vocab_size=128256, seq_len=4096),
        "llama-3-8b": LlamaConfig(4096, 14336, 32, 32, 8, vocab_size=128256, seq_len=8192),
    }
)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean of squares in float32 or wider (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotary_angles(config: LlamaConfig, like_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [S, D], of position s times frequency theta^(-2i/D), halves repeated."""
    seq_len, size, device = like_BSH.shape[1], config.head_size, like_BSH.device
    dtype = torch.promote_types(like_BSH.dtype, torch.float32)
    exponent_D = torch.arange(0, size, 2, device=device, dtype=dtype) / size  # [D/2]
    position_S = torch.arange(seq_len, device=device, dtype=dtype)
    angle_SD = position_S[:, None] * config.rope_theta**-exponent_D  # [S, D/2]
    angle_SD = torch.cat((angle_SD, angle_SD), dim=-1)  # [S, D]
    return angle_SD.cos().to(like_BSH.dtype), angle_SD.sin().to(like_BSH.dtype)


def rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle (Su et al., 2021)."""
    low, high = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat((-high, low), dim=-1) * sin_SD


class Attention(nn.Module):
    """Causal attention whose N query heads share K key and value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.num_groups = config.num_heads // config.num_kv_heads
        self.query = nn.Linear(config.hidden, config.hidden, bias=False)
        self.key = nn.Linear(config.hidden, config.num_kv_heads * config.head_size, bias=False)
        self.value = nn.Linear(config.hidden, config.num_kv_heads * config.head_size, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def _heads(self, x_BSH: Tensor) -> Tensor:
        return x_BSH.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def _repeat(self, x_BKSD: Tensor) -> Tensor:
        """Each key head once per query head that reads it: [B, K, S, D] -> [B, N, S, D]."""
        if self.num_groups == 1:
            return x_BKSD
        return x_BKSD[:, :, None].expand(-1, -1, self.num_groups, -1, -1).flatten(1, 2)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        q_BNSD = rotate(self._heads(self.query(x_BSH)), cos_SD, sin_SD)
        k_BKSD = rotate(self._heads(self.key(x_BSH)), cos_SD, sin_SD)
        k_BNSD, v_BNSD = self._repeat(k_BKSD), self._repeat(self._heads(self.value(x_BSH)))
        y_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
        return self.out(y_BNSD.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BSH)) * self.up(x_BSH))


class Block(nn.Module):
    """Attention and SwiGLU, each on a normalised input and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.norm_mlp = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(self.norm_attention(x_BSH), cos_SD, sin_SD)
        return x_BSH + self.mlp(self.norm_mlp(x_BSH))


class Llama(nn.Module):
    """Decoder-only language model with its loss."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens_BS)
        cos_SD, sin_SD = rotary_angles(self.config, x_BSH)
        for block in self.blocks:
            x_BSH = block(x_BSH, cos_SD, sin_SD)
        logits_BSV = self.head(self.norm(x_BSH))
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def example_batch(
    config: LlamaConfig, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random (tokens_BS, targets_BS), int64; the targets are the tokens one position on."""
    shape = (batch_size, config.seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def flops_per_sample(config: LlamaConfig) -> float:
    """Model FLOPs of one sequence, forward and backward, nothing recomputed.

    6 FLOP per token and matmul weight; attention 6 L S H per token, the causal half of PaLM's
    12 L S H (Chowdhery et al., 2022, appendix B).
    """
    hidden, layers, seq_len = config.hidden, config.num_layers, config.seq_len
    kv_size = config.num_kv_heads * config.head_size
    layer_weights = 2 * hidden * (hidden + kv_size) + 3 * hidden * config.feed_forward
    weights = layers * layer_weights + hidden * config.vocab_size
    return float(seq_len * (6 * weights + 6 * layers * seq_len * hidden))
