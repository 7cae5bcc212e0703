"""GShard mixture of experts: a decoder whose every second feed-forward is a set of experts.

Dispatch and combine are einsums over one-hot capacity slots (Lepikhin et al., 2020, algorithm 1),
so that the whole layer is dense algebra. A sequence is one gating group: capacity and the
cumulative sum that fills it stay within a sample, and sharding the batch changes no number.

``MoE(config)(tokens_BS, targets_BS)`` is the mean cross-entropy plus the weighted balance loss.
B batch (= gating groups), S sequence, H hidden, F feed-forward, E experts, C capacity slots.
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
class MoEConfig:
    """Sizes of a GShard decoder. ``capacity_factor`` 1.0 gives each expert 2 S / E slots."""

    hidden: int
    num_layers: int
    num_heads: int
    num_experts: int
    feed_forward: int
    vocab_size: int = 32000
    seq_len: int = 1024
    capacity_factor: float = 1.0
    balance_weight: float = 0.01
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden % self.num_heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of {self.num_heads} heads")
        if self.num_experts < 2:
            raise ValueError(f"top-2 gating needs two experts or more: got {self.num_experts}")

    @property
    def capacity(self) -> int:
        """Slots of one expert for one sequence: top-2 fills 2 S slots in all."""
        return math.ceil(2 * self.seq_len * self.capacity_factor / self.num_experts)


# Alpa (OSDI'22), table 6: feed-forward of 8 x hidden, every second layer with experts.
CONFIGS: Mapping[str, MoEConfig] = MappingProxyType(
    {
        "moe-tiny": MoEConfig(64, 4, 4, 4, feed_forward=128, vocab_size=128, seq_len=16),
        "moe-380m": MoEConfig(768, 8, 16, 8, feed_forward=8 * 768),
        "moe-2.4b": MoEConfig(1024, 16, 16, 16, feed_forward=8 * 1024),
    }
)


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused query, key and value projection."""

    def __init__(self, config: MoEConfig) -> None:
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


def _slots(mask_BSE: Tensor, taken_BE: Tensor, capacity: int) -> Tensor:
    """[B, S, E, C]: 1 where token s has slot c of expert e; a token beyond capacity has none."""
    before_BSE = mask_BSE.cumsum(dim=1) - mask_BSE + taken_BE[:, None]
    slot_C = torch.arange(capacity, device=mask_BSE.device, dtype=mask_BSE.dtype)
    return mask_BSE[..., None] * (before_BSE[..., None] == slot_C).to(mask_BSE.dtype)


def top2_gating(probability_BSE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Combine weights [B, S, E, C] and the balance loss of softmax gates.

    First choices take slots before second ones; the two gates of a token are normalised to one
    before tokens are dropped. Balance: E sum_e mean_s(p_e) mean_s(first choice is e), mean over B.
    """
    dtype, num_experts = probability_BSE.dtype, probability_BSE.shape[-1]
    expert_E = torch.arange(num_experts, device=probability_BSE.device)
    first_BSE = (probability_BSE.argmax(-1, keepdim=True) == expert_E).to(dtype)
    rest_BSE = probability_BSE * (1 - first_BSE)
    second_BSE = (rest_BSE.argmax(-1, keepdim=True) == expert_E).to(dtype)

    gate_first_BSE, gate_second_BSE = probability_BSE * first_BSE, probability_BSE * second_BSE
    total_BS1 = (gate_first_BSE + gate_second_BSE).sum(-1, keepdim=True)
    nobody_BE = torch.zeros_like(first_BSE[:, 0])
    slots_first = _slots(first_BSE, nobody_BE, capacity)
    slots_second = _slots(second_BSE, first_BSE.sum(dim=1), capacity)
    combine_BSEC = (gate_first_BSE / total_BS1)[..., None] * slots_first
    combine_BSEC = combine_BSEC + (gate_second_BSE / total_BS1)[..., None] * slots_second

    balance_B = num_experts * (probability_BSE.mean(dim=1) * first_BSE.mean(dim=1)).sum(-1)
    return combine_BSEC, balance_B.mean()


class Experts(nn.Module):
    """Top-2 gated experts with stacked weights, as einsums. Returns the output and balance loss."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.capacity = config.capacity
        experts, hidden, feed_forward = config.num_experts, config.hidden, config.feed_forward
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up_EHF = nn.Parameter(torch.empty(experts, hidden, feed_forward))
        self.down_EFH = nn.Parameter(torch.empty(experts, feed_forward, hidden))

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        logits_BSE = self.gate(x_BSH)
        wide = torch.promote_types(x_BSH.dtype, torch.float32)
        combine_BSEC, balance = top2_gating(logits_BSE.to(wide).softmax(-1), self.capacity)
        combine_BSEC = combine_BSEC.to(x_BSH.dtype)
        dispatch_BSEC = (combine_BSEC > 0).to(x_BSH.dtype)
        slots_EBCH = torch.einsum("bsec,bsh->ebch", dispatch_BSEC, x_BSH)
        h_EBCF = F.gelu(torch.einsum("ebch,ehf->ebcf", slots_EBCH, self.up_EHF), approximate="tanh")
        y_EBCH = torch.einsum("ebcf,efh->ebch", h_EBCF, self.down_EFH)
        return torch.einsum("bsec,ebch->bsh", combine_BSEC, y_EBCH), balance


class FeedForward(nn.Module):
    """The dense counterpart of :class:`Experts`, with a balance loss of zero."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSH), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm attention and a feed-forward, of experts in every second block."""

    def __init__(self, config: MoEConfig, *, has_experts: bool) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.hidden)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.hidden)
        self.mlp = Experts(config) if has_experts else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block's output and, from a block with experts, its balance loss."""
        x_BSH = x_BSH + self.dropout(self.attention(self.norm_attention(x_BSH)))
        mlp_out = self.mlp(self.norm_mlp(x_BSH))
        y_BSH, balance = mlp_out if isinstance(mlp_out, tuple) else (mlp_out, None)
        return x_BSH + self.dropout(y_BSH), balance


class MoE(nn.Module):
    """Decoder-only language model with experts, and its loss."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.balance_weight = config.balance_weight
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.position_embedding = nn.Embedding(config.seq_len, config.hidden)
        self.blocks = nn.ModuleList(
            Block(config, has_experts=layer % 2 == 1) for layer in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                # Gates of unit variance keep expert choices clear of ties, hence of rounding.
                std = config.hidden**-0.5 if name.endswith("gate.weight") else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        position_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSH = self.token_embedding(tokens_BS) + self.position_embedding(position_S)
        balances = []
        for block in self.blocks:
            x_BSH, balance = block(x_BSH)
            if balance is not None:
                balances.append(balance)
        logits_BSV = F.linear(self.norm(x_BSH), self.token_embedding.weight)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
        return loss + self.balance_weight * sum(balances)


def example_batch(
    config: MoEConfig, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random (tokens_BS, targets_BS), int64; the targets are the tokens one position on."""
    shape = (batch_size, config.seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def flops_per_sample(config: MoEConfig) -> float:
    """Model FLOPs of one sequence, forward and backward, nothing recomputed, every slot full.

    6 FLOP per token and matmul weight, a token using two experts (times the capacity factor);
    attention 6 L S H per token. The dispatch and combine einsums are overhead, not model FLOPs.
    """
    hidden, layers, seq_len = config.hidden, config.num_layers, config.seq_len
    expert_layers = layers // 2
    expert_uses = 2 * config.capacity_factor
    mlp = 2 * hidden * config.feed_forward
    weights = (
        layers * 4 * hidden**2
        + (layers - expert_layers) * mlp
        + expert_layers * (expert_uses * mlp + hidden * config.num_experts)
        + hidden * config.vocab_size
    )
    return seq_len * (6 * weights + 6 * layers * seq_len * hidden)
