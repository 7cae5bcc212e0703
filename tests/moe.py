"""Tiny mixtures of experts from transformers' configurations: four and eight experts, two layers,
auxiliary loss on. Importable by spawned processes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

BATCH, SEQ, VOCAB = 8, 16, 64

_COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ,
    "vocab_size": VOCAB,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}


def mixtral(**options: Any) -> tuple[nn.Module, Any]:
    config = transformers.MixtralConfig(**{**_COMMON, "num_local_experts": 4, **options})
    return _seeded(transformers.MixtralForCausalLM, config)


def qwen3_moe(**options: Any) -> tuple[nn.Module, Any]:
    sizes = {"moe_intermediate_size": 16, "head_dim": 4, "num_experts": 8}
    config = transformers.Qwen3MoeConfig(**{**_COMMON, **sizes, **options})
    return _seeded(transformers.Qwen3MoeForCausalLM, config)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}


def _seeded(factory: type[nn.Module], config: Any) -> tuple[nn.Module, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory(config)
        tokens = torch.randint(1, VOCAB, (BATCH, SEQ))
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}
