"""Models at their published sizes, from Hugging Face's configurations, with a global batch each.

    autopar plan benchmarks.published:llama_3_8b --cluster h100:1x8 --precision bf16

`autopar plan` builds them on meta: no weights are made or downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Pair = tuple[nn.Module, Mapping[str, Tensor]]


def gpt2_124m() -> Pair:
    """16 rows of 1024 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _training(GPT2LMHeadModel(GPT2Config(use_cache=False)), rows=16, length=1024)


def llama_3_8b() -> Pair:
    """64 rows of 8192 tokens."""
    return _llama(
        rows=64,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    )


def llama_3_405b() -> Pair:
    """2048 rows of 8192 tokens."""
    return _llama(
        rows=2048,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
    )


def llama_3_405b_wide() -> Pair:
    """16384 rows of 8192 tokens, for 16384 devices."""
    return _llama(
        rows=16384,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
    )


def gpt_39b() -> Pair:
    """Alpa's GPT-39B: 1024 rows of 1024 tokens, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=51200,
        n_positions=1024,
        n_embd=8192,
        n_layer=48,
        n_head=64,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _training(GPT2LMHeadModel(config), rows=1024, length=1024)


def mixtral_8x7b() -> Pair:
    """256 rows of 4096 tokens; without the balance loss, as the configuration has it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(use_cache=False, max_position_embeddings=4096)
    return _training(MixtralForCausalLM(config), rows=256, length=4096)


def _llama(*, rows: int, **sizes: int) -> Pair:
    from transformers import LlamaConfig, LlamaForCausalLM

    length = 8192
    config = LlamaConfig(
        vocab_size=128256,
        num_key_value_heads=8,
        max_position_embeddings=length,
        use_cache=False,
        **sizes,
    )
    return _training(LlamaForCausalLM(config), rows=rows, length=length)


def _training(model: nn.Module, *, rows: int, length: int) -> Pair:
    tokens = torch.zeros(rows, length, dtype=torch.long)
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}
