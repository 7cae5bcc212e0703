"""Models whose sizes no mesh divides: seven rows in a microbatch, five heads, 131 tokens, odd
widths. As in `tests.zoo`, a factory returns ``(module, example_batch)``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from autopar.models import Factory

BATCH, SEQ, VOCAB = 14, 6, 131  # two microbatches of seven rows


def gpt2(batch: int = BATCH) -> tuple[nn.Module, Any]:
    """One layer of five heads of seven; dropout on, embedding tied to the head."""
    config = transformers.GPT2Config(
        n_embd=35,
        n_layer=1,
        n_head=5,
        n_positions=SEQ,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = torch.randint(1, VOCAB, (batch, SEQ))
        labels = tokens.clone()
        labels[0, :2] = -100
        model = transformers.GPT2LMHeadModel(config)
    return model.train(), {"input_ids": tokens, "labels": labels}


class _Images(nn.Module):
    """Convolutions with batch and group norm, seven classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, padding=1),
            nn.GroupNorm(3, 6),
            nn.MaxPool2d(2),
            nn.SiLU(),
        )
        self.head = nn.Linear(6 * 9, 7)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        logits = self.head(self.body(images).flatten(1))
        return nn.functional.cross_entropy(logits, classes)


def images(batch: int = BATCH) -> tuple[nn.Module, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Images().train(), (torch.randn(batch, 3, 6, 6), torch.randint(7, (batch,)))


UNEVEN: Mapping[str, Factory] = MappingProxyType({"uneven gpt2": gpt2, "uneven images": images})
