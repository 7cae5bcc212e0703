"""Language models of transformers: decoders, mixtures of experts, encoders, encoder-decoders.

Published parameter counts, in millions, are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.zoo.batches import causal, masked, speech, translation
from tests.zoo.rows import Family, Size

_IDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
_REAL = {"use_cache": False}
# The names that most configurations share.
_WIDE = {**_IDS, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 16}
_GROUPED = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
_EQUAL = {"num_hidden_layers": 4, "num_attention_heads": 4}
_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
_ENCODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}

DECODERS: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family(
            "dropout on, embedding tied to the head",
            "GPT2Config",
            "GPT2LMHeadModel",
            causal,
            {**_IDS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 16},
            {
                "gpt2-124m": Size(124.4, 1024, _REAL),
                "gpt2-xl": Size(
                    1557.6, 1024, {**_REAL, "n_embd": 1600, "n_layer": 48, "n_head": 25}
                ),
            },
        ),
        "gpt_neo": Family(
            "global and local attention in turn",
            "GPTNeoConfig",
            "GPTNeoForCausalLM",
            causal,
            {
                **_IDS,
                "hidden_size": 32,
                "num_layers": 4,
                "num_heads": 4,
                "max_position_embeddings": 16,
                "window_size": 8,
                "attention_types": [[["global", "local"], 2]],
                "resid_dropout": 0.1,
                "embed_dropout": 0.1,
                "attention_dropout": 0.1,
            },
            {
                "gpt-neo-2.7b": Size(
                    2651.3,
                    2048,
                    {
                        **_REAL,
                        "hidden_size": 2560,
                        "num_layers": 32,
                        "num_heads": 20,
                        "attention_types": [[["global", "local"], 16]],
                    },
                )
            },
        ),
        "gpt_j": Family(
            "attention and feed-forward side by side, interleaved rotary positions",
            "GPTJConfig",
            "GPTJForCausalLM",
            causal,
            {
                **_IDS,
                "n_embd": 32,
                "n_layer": 4,
                "n_head": 4,
                "n_positions": 16,
                "rotary_dim": 4,
                "resid_pdrop": 0.1,
                "embd_pdrop": 0.1,
                "attn_pdrop": 0.1,
            },
            {"gpt-j-6b": Size(6050.9, 2048, _REAL)},
        ),
        "gpt_neox": Family(
            "parallel residual, rotary positions on a quarter of each head",
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            causal,
            {**_WIDE, **_EQUAL, "hidden_dropout": 0.1, "attention_dropout": 0.1},
            {
                "gpt-neox-20b": Size(
                    20554.6,
                    2048,
                    {
                        **_REAL,
                        "vocab_size": 50432,
                        "hidden_size": 6144,
                        "num_hidden_layers": 44,
                        "num_attention_heads": 64,
                        "intermediate_size": 24576,
                    },
                )
            },
        ),
        "bloom": Family(
            "ALiBi positions as an attention bias",
            "BloomConfig",
            "BloomForCausalLM",
            causal,
            {
                **_IDS,
                "hidden_size": 32,
                "n_layer": 4,
                "n_head": 4,
                "hidden_dropout": 0.1,
                "attention_dropout": 0.1,
            },
            {
                "bloom-7b1": Size(
                    7069.0, 2048, {**_REAL, "hidden_size": 4096, "n_layer": 30, "n_head": 32}
                )
            },
        ),
        "opt": Family(
            "learned positions, ReLU",
            "OPTConfig",
            "OPTForCausalLM",
            causal,
            {
                **_IDS,
                **_EQUAL,
                "pad_token_id": 0,
                "hidden_size": 32,
                "ffn_dim": 64,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 16,
            },
            {
                "opt-6.7b": Size(
                    6658.5,
                    2048,
                    {
                        **_REAL,
                        "hidden_size": 4096,
                        "num_hidden_layers": 32,
                        "num_attention_heads": 32,
                        "ffn_dim": 16384,
                        "word_embed_proj_dim": 4096,
                    },
                )
            },
        ),
        "llama": Family(
            "grouped-query attention: eight query heads on four of keys; rotary positions; SwiGLU",
            "LlamaConfig",
            "LlamaForCausalLM",
            causal,
            {**_WIDE, **_GROUPED},
            {
                "llama-2-7b": Size(6738.4, 4096, _REAL),
                "llama-3-70b": Size(
                    70553.7,
                    8192,
                    {
                        **_REAL,
                        "vocab_size": 128256,
                        "hidden_size": 8192,
                        "intermediate_size": 28672,
                        "num_hidden_layers": 80,
                        "num_attention_heads": 64,
                        "num_key_value_heads": 8,
                        "max_position_embeddings": 8192,
                    },
                ),
            },
        ),
        "qwen2": Family(
            "as Llama, with biases on query, key and value",
            "Qwen2Config",
            "Qwen2ForCausalLM",
            causal,
            {**_WIDE, **_GROUPED},
            {
                "qwen2-7b": Size(
                    7615.6,
                    4096,
                    {
                        **_REAL,
                        "vocab_size": 152064,
                        "hidden_size": 3584,
                        "intermediate_size": 18944,
                        "num_hidden_layers": 28,
                        "num_attention_heads": 28,
                        "num_key_value_heads": 4,
                    },
                )
            },
        ),
        "qwen3": Family(
            "as Llama, with norms of queries and keys",
            "Qwen3Config",
            "Qwen3ForCausalLM",
            causal,
            {**_WIDE, **_GROUPED, "head_dim": 8},
            {
                "qwen3-8b": Size(
                    8190.7,
                    4096,
                    {
                        **_REAL,
                        "hidden_size": 4096,
                        "intermediate_size": 12288,
                        "num_hidden_layers": 36,
                        "num_attention_heads": 32,
                        "num_key_value_heads": 8,
                    },
                )
            },
        ),
        "phi": Family(
            "parallel residual, partial rotary positions, biases everywhere",
            "PhiConfig",
            "PhiForCausalLM",
            causal,
            {**_WIDE, **_EQUAL, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
            {
                "phi-2": Size(
                    2779.7,
                    2048,
                    {
                        **_REAL,
                        "hidden_size": 2560,
                        "intermediate_size": 10240,
                        "num_hidden_layers": 32,
                        "num_attention_heads": 32,
                        "rope_parameters": {
                            "rope_type": "default",
                            "rope_theta": 10000.0,
                            "partial_rotary_factor": 0.4,
                        },
                    },
                )
            },
        ),
        "stablelm": Family(
            "LayerNorm with SwiGLU, partial rotary positions",
            "StableLmConfig",
            "StableLmForCausalLM",
            causal,
            {**_WIDE, **_GROUPED, "hidden_dropout": 0.1, "attention_dropout": 0.1},
            {"stablelm-3b": Size(2795.4, 4096, _REAL)},
        ),
        "falcon": Family(
            "one head of keys and values for all queries, parallel residual",
            "FalconConfig",
            "FalconForCausalLM",
            causal,
            {
                **_IDS,
                **_EQUAL,
                "hidden_size": 32,
                "max_position_embeddings": 16,
                "hidden_dropout": 0.1,
                "attention_dropout": 0.1,
            },
            {"falcon-7b": Size(6921.7, 2048, _REAL)},
        ),
        "mistral": Family(
            "grouped-query attention in a sliding window",
            "MistralConfig",
            "MistralForCausalLM",
            causal,
            {**_WIDE, **_GROUPED, "sliding_window": 8},
            {"mistral-7b": Size(7241.7, 8192, _REAL)},
        ),
        "gemma2": Family(
            "capped scores and logits, local and global attention in turn, four norms a block",
            "Gemma2Config",
            "Gemma2ForCausalLM",
            causal,
            {
                **_WIDE,
                **_GROUPED,
                "head_dim": 8,
                "sliding_window": 8,
                "query_pre_attn_scalar": 8,
                "pad_token_id": 0,
                "attn_implementation": "eager",  # the only one that caps the scores
            },
            {
                "gemma-2-9b": Size(
                    9241.7,
                    4096,
                    {
                        **_REAL,
                        "hidden_size": 3584,
                        "intermediate_size": 14336,
                        "num_hidden_layers": 42,
                        "num_attention_heads": 16,
                        "num_key_value_heads": 8,
                        "attn_implementation": "eager",
                    },
                )
            },
        ),
        "mamba": Family(
            "selective state space: a causal depthwise convolution and a scan over time",
            "MambaConfig",
            "MambaForCausalLM",
            causal,
            {
                **_IDS,
                "hidden_size": 32,
                "state_size": 4,
                "time_step_rank": 4,
                "num_hidden_layers": 2,
                "pad_token_id": 0,
            },
            {"mamba-130m": Size(129.1, 64, {**_REAL, "num_hidden_layers": 24})},
            length=8,
        ),
    }
)

EXPERTS: Mapping[str, Family] = MappingProxyType(
    {
        "mixtral": Family(
            "two of four experts for each token, and a loss that balances them",
            "MixtralConfig",
            "MixtralForCausalLM",
            causal,
            {**_WIDE, **_GROUPED, **_BALANCED, "num_hidden_layers": 2, "num_local_experts": 4},
            {"mixtral-8x7b": Size(46702.8, 4096, _REAL)},
            equal_rows=False,
        ),
        "qwen3_moe": Family(
            "two of eight small experts for each token, norms of queries and keys",
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            causal,
            {
                **_WIDE,
                **_GROUPED,
                **_BALANCED,
                "num_hidden_layers": 2,
                "head_dim": 8,
                "moe_intermediate_size": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
            },
            {
                "qwen3-30b-a3b": Size(
                    30532.1,
                    4096,
                    {
                        **_REAL,
                        "hidden_size": 2048,
                        "num_hidden_layers": 48,
                        "num_attention_heads": 32,
                        "num_key_value_heads": 4,
                        "head_dim": 128,
                        "moe_intermediate_size": 768,
                        "num_experts": 128,
                        "num_experts_per_tok": 8,
                    },
                )
            },
            equal_rows=False,
        ),
    }
)

ENCODERS: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(
            "masked language model, dropout on",
            "BertConfig",
            "BertForMaskedLM",
            masked,
            _ENCODER,
            {
                "bert-large": Size(
                    335.2,
                    512,
                    {
                        "hidden_size": 1024,
                        "intermediate_size": 4096,
                        "num_hidden_layers": 24,
                        "num_attention_heads": 16,
                    },
                )
            },
        ),
        "roberta": Family(
            "masked language model, positions counted from the padding id",
            "RobertaConfig",
            "RobertaForMaskedLM",
            masked,
            {**_ENCODER, "max_position_embeddings": 20, "pad_token_id": 0, "type_vocab_size": 1},
            {
                "roberta-large": Size(
                    355.4,
                    512,
                    {
                        "vocab_size": 50265,
                        "hidden_size": 1024,
                        "intermediate_size": 4096,
                        "num_hidden_layers": 24,
                        "num_attention_heads": 16,
                        "max_position_embeddings": 514,
                        "type_vocab_size": 1,
                    },
                )
            },
        ),
        "distilbert": Family(
            "masked language model without token types",
            "DistilBertConfig",
            "DistilBertForMaskedLM",
            masked,
            {
                "vocab_size": 128,
                "dim": 32,
                "hidden_dim": 64,
                "n_layers": 4,
                "n_heads": 4,
                "max_position_embeddings": 16,
            },
            {"distilbert-base": Size(67.0, 512)},
        ),
    }
)

_SEQUENCES = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}

ENCODER_DECODERS: Mapping[str, Family] = MappingProxyType(
    {
        "t5": Family(
            "encoder-decoder, dropout on, relative bias, embedding used three times",
            "T5Config",
            "T5ForConditionalGeneration",
            translation,
            {
                "vocab_size": 128,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
                "use_cache": False,
            },
            {
                "t5-3b": Size(
                    2851.6,
                    512,
                    {
                        **_REAL,
                        "d_model": 1024,
                        "d_kv": 128,
                        "d_ff": 16384,
                        "num_layers": 24,
                        "num_heads": 32,
                        "decoder_start_token_id": 0,
                    },
                )
            },
        ),
        "bart": Family(
            "encoder-decoder with learned positions and a tied head",
            "BartConfig",
            "BartForConditionalGeneration",
            translation,
            {**_SEQUENCES, "max_position_embeddings": 16},
            {"bart-large": Size(406.3, 1024, _REAL)},
        ),
        "whisper": Family(
            "speech to text: two convolutions over time, then an encoder-decoder",
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            speech,
            {
                **_SEQUENCES,
                "num_mel_bins": 8,
                "max_source_positions": 16,
                "max_target_positions": 16,
            },
            {
                "whisper-large": Size(
                    1543.3,
                    448,
                    {
                        **_REAL,
                        "vocab_size": 51865,
                        "d_model": 1280,
                        "encoder_layers": 32,
                        "decoder_layers": 32,
                        "encoder_attention_heads": 20,
                        "decoder_attention_heads": 20,
                        "encoder_ffn_dim": 5120,
                        "decoder_ffn_dim": 5120,
                    },
                )
            },
        ),
    }
)
