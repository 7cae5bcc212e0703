"""GPT-2/3 decoder: learned positions, pre-norm blocks, GELU, causal attention (Radford, 2019).

``GPT(config)(tokens_BS, targets_BS)`` is the mean cross-entropy over all tokens.
B batch, S sequence, H hidden, F feed-forward, N heads, D head size, V vocabulary.
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
class GPTConfig:
    """Sizes of a GPT. The feed-forward size is 4 x hidden."""

    hidden: int
    num_layers: int
    num_heads: int
    vocab_size: int = 51200
    seq_len: int = 1024
    dropout: float = 0.0
    tied_head: bool = True

    def __post_init__(self) -> None:
        if self.hidden % self.num_heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of {self.num_heads} heads")


# gpt-124m: GPT-2 small. The others: Alpa (OSDI'22), table 5, with Megatron's padded vocabulary.
CONFIGS: Mapping[str, GPTConfig] = MappingProxyType(
    {
        "gpt-tiny": GPTConfig(64, 4, 4, vocab_size=128, seq_len=16, dropout=0.1),
        "gpt-124m": GPTConfig(768, 12, 12, vocab_size=50257, dropout=0.1),
        "gpt-1.3b": GPTConfig(2048, 24, 32),
        "gpt-2.6b": GPTConfig(2560, 32, 32),
        "gpt-39b": GPTConfig(8192, 48, 64),
    }
)


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused query, key and value projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        qkv_BSH = self.qkv(x_BSH).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in qkv_BSH)
        dropout_p = self.dropout if self.training else 0.0
        y_BNSD = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return self.out(y_BNSD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.hidden)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.hidden)
        self.up = nn.Linear(config.hidden, 4 * config.hidden)
        self.down = nn.Linear(4 * config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.dropout(self.attention(self.norm_attention(x_BSH)))
        h_BSF = F.gelu(self.up(self.norm_mlp(x_BSH)), approximate="tanh")
        return x_BSH + self.dropout(self.down(h_BSF))


class GPT(nn.Module):
    """Decoder-only language model with its loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.position_embedding = nn.Embedding(config.seq_len, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self._initialise(config.num_layers)
        if config.tied_head:
            self.head.weight = self.token_embedding.weight

    def _initialise(self, num_layers: int) -> None:
        """Normal(0, 0.02); projections into the residual stream scaled by 1/sqrt(2 L) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                scale = 1 / math.sqrt(2 * num_layers) if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        position_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSH = self.token_embedding(tokens_BS) + self.position_embedding(position_S)
        x_BSH = self.dropout(x_BSH)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        logits_BSV = self.head(self.norm(x_BSH))
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def example_batch(
    config: GPTConfig, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random (tokens_BS, targets_BS), int64; the targets are the tokens one position on."""
    shape = (batch_size, config.seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def flops_per_sample(config: GPTConfig) -> float:
    """Model FLOPs of one sequence, forward and backward, nothing recomputed.

    6 FLOP per token and matmul weight (12 L H^2 + H V); attention 6 L S H per token, the causal
    half of PaLM's 12 L S H (Chowdhery et al., 2022, appendix B).
    """
    hidden, layers, seq_len = config.hidden, config.num_layers, config.seq_len
    weights = 12 * layers * hidden**2 + hidden * config.vocab_size
    return float(seq_len * (6 * weights + 6 * layers * seq_len * hidden))
