"""The demo's text: real bytes, deterministic batches."""

from __future__ import annotations

import pytest
import torch

from benchmarks.text import byte_batches, corpus


def test_batches_are_windows_of_the_corpus() -> None:
    batches = byte_batches(4, 32, 3, seed=1)
    assert [tuple(b.shape) for b in batches] == [(4, 32)] * 3
    assert all(b.dtype == torch.int64 for b in batches)
    for row in batches[0]:
        assert bytes(row.tolist()) in corpus()


def test_seed_decides_the_batches() -> None:
    first, again, other = (byte_batches(2, 16, 2, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_corpus_is_english_prose_of_useful_size() -> None:
    assert len(corpus()) > 200_000
    assert b"expression" in corpus()


def test_window_longer_than_the_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len"):
        byte_batches(1, len(corpus()) + 1, 1, seed=0)
