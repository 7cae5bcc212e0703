"""The eight tiny models on which parallel and single-device steps are compared.

Each factory returns ``(module, example_batch)``: random weights under a fixed seed, train mode,
dropout on where the model has it, batch 8, and sizes that a plan may shard divisible by 4. Calling
one leaves the global random state as it was. As rows of a batch weigh the same in every loss, the
mean over equal microbatches is the loss of the whole batch (but BatchNorm's statistics are those of
a microbatch).
Hugging Face models take a dict and return ``.loss``; the others take a tuple and return the loss.

On the command line a model of the zoo is called ``tests/zoo.py:gpt2``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.models import MODELS

BATCH, SEQ, VOCAB = 8, 16, 128

Factory = Callable[[], tuple[nn.Module, Any]]


def _deterministic(factory: Factory) -> Factory:
    """``factory`` under seed 0, in train mode, without a trace in the global random state."""

    @wraps(factory)
    def seeded() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, batch = factory()
        return module.train(), batch

    return seeded


def _tokens() -> Tensor:
    """[BATCH, SEQ] ids without 0, which some models take for padding."""
    return torch.randint(1, VOCAB, (BATCH, SEQ))


@_deterministic
def gpt2() -> tuple[nn.Module, Any]:
    """Dropout on, embedding tied to the head."""
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=SEQ,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    tokens = _tokens()
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens.clone()}


@_deterministic
def llama() -> tuple[nn.Module, Any]:
    """Grouped-query attention: eight query heads on four key heads; rotary positions; SwiGLU."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQ,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    tokens = _tokens()
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens.clone()}


@_deterministic
def bert() -> tuple[nn.Module, Any]:
    """Masked language model, dropout on: four of the sixteen tokens of each row have a label."""
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQ,
        vocab_size=VOCAB,
    )
    tokens = _tokens()
    is_masked = torch.rand(BATCH, SEQ).argsort(dim=1) < SEQ // 4
    batch = {
        "input_ids": tokens.masked_fill(is_masked, 3),
        "labels": tokens.masked_fill(~is_masked, -100),  # -100: Hugging Face's "no label"
    }
    return transformers.BertForMaskedLM(config), batch


@_deterministic
def vit() -> tuple[nn.Module, Any]:
    """Image classification on sixteen patches and the class token."""
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=16,
        problem_type="single_label_classification",
    )
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        "labels": torch.randint(16, (BATCH,)),
    }
    return transformers.ViTForImageClassification(config), batch


@_deterministic
def t5() -> tuple[nn.Module, Any]:
    """Encoder-decoder, two blocks each: dropout on, relative bias, embedding used three times."""
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        use_cache=False,
    )
    batch = {"input_ids": _tokens(), "labels": _tokens()}
    return transformers.T5ForConditionalGeneration(config), batch


@_deterministic
def wide_resnet() -> tuple[nn.Module, Any]:
    """Four bottlenecks with BatchNorm."""
    case = MODELS["wresnet-tiny"]
    return case.build(), case.batch(BATCH)


@_deterministic
def unet() -> tuple[nn.Module, Any]:
    """Diffusion U-Net of two levels: skip connections, GroupNorm, attention at the lower level."""
    case = MODELS["unet-tiny"]
    return case.build(), case.batch(BATCH)


@_deterministic
def gshard_moe() -> tuple[nn.Module, Any]:
    """Four blocks, two of them with four experts, top-2 gating and a balance loss."""
    case = MODELS["moe-tiny"]
    return case.build(), case.batch(BATCH)


ZOO: Mapping[str, Factory] = MappingProxyType(
    {
        "gpt2": gpt2,
        "llama": llama,
        "bert": bert,
        "vit": vit,
        "t5": t5,
        "wide_resnet": wide_resnet,
        "unet": unet,
        "gshard_moe": gshard_moe,
    }
)
