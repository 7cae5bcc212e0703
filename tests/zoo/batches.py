"""The kinds of batches: one function each, from a configuration and the length of a row.

Ids are never 0, which some models take for padding. Every row has as many labels as any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.rows import ROWS

NO_LABEL = -100  # Hugging Face's
MASK = 3


def _ids(vocab_size: int, length: int) -> Tensor:
    return torch.randint(1, vocab_size, (ROWS, length))


def causal(config: Any, length: int) -> dict[str, Tensor]:
    """Every token is a label."""
    tokens = _ids(config.vocab_size, length)
    return {"input_ids": tokens, "labels": tokens.clone()}


def masked(config: Any, length: int) -> dict[str, Tensor]:
    """A quarter of the tokens of each row is masked and has a label."""
    tokens = _ids(config.vocab_size, length)
    is_masked = torch.rand(ROWS, length).argsort(dim=1) < length // 4
    return {
        "input_ids": tokens.masked_fill(is_masked, MASK),
        "labels": tokens.masked_fill(~is_masked, NO_LABEL),
    }


def translation(config: Any, length: int) -> dict[str, Tensor]:
    """Source and target of one length."""
    return {
        "input_ids": _ids(config.vocab_size, length),
        "labels": _ids(config.vocab_size, length),
    }


def _pixels(config: Any) -> Tensor:
    return torch.randn(ROWS, config.num_channels, config.image_size, config.image_size)


def labelled_images(config: Any, length: int) -> dict[str, Tensor]:
    labels = torch.randint(config.num_labels, (ROWS,))
    return {"pixel_values": _pixels(config), "labels": labels}


def captioned_images(config: Any, length: int) -> dict[str, Any]:
    """A caption ends with the end token, whose position is the one that is read."""
    text = config.text_config
    tokens = _ids(text.eos_token_id, length)
    tokens[:, -1] = text.eos_token_id
    return {
        "input_ids": tokens,
        "pixel_values": _pixels(config.vision_config),
        "return_loss": True,
    }


def speech(config: Any, length: int) -> dict[str, Tensor]:
    """Log-mel frames, two for each position of the encoder, and a transcript."""
    frames = 2 * config.max_source_positions
    return {
        "input_features": torch.randn(ROWS, config.num_mel_bins, frames),
        "labels": _ids(config.vocab_size, length),
    }
