"""Real text that every Python carries, byte by byte: the language reference in ``pydoc_data``, or
the sources of the library.

About 0.45 MB, and some 10 MB; a token is a byte, so any vocabulary of 256 or more will do. The text
differs a little between Python releases.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor


@cache
def corpus() -> bytes:
    """All topics of the language reference, in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


@cache
def library() -> bytes:
    """The modules of Python's library, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def byte_batches(
    batch_size: int, seq_len: int, num_batches: int, seed: int, source: bytes | None = None
) -> list[Tensor]:
    """``num_batches`` tensors [batch_size, seq_len], int64, of byte values in 0..255.

    Each row is a random window of the source, the corpus by default. The same arguments give the
    same batches.
    """
    text = torch.frombuffer(bytearray(source or corpus()), dtype=torch.uint8)
    if not 0 < seq_len <= len(text):
        raise ValueError(f"seq_len must lie in 1..{len(text)}, the corpus in bytes: got {seq_len}")
    generator = torch.Generator().manual_seed(seed)
    offset_S = torch.arange(seq_len)
    batches = []
    for _ in range(num_batches):
        start_B = torch.randint(len(text) - seq_len + 1, (batch_size, 1), generator=generator)
        batches.append(text[start_B + offset_S].long())
    return batches
