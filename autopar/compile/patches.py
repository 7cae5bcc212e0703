"""Parts of Inductor that are replaced while it compiles for us."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def replaced(owner: Any, name: str, ours: Any, tag: str) -> Iterator[None]:
    """A function of a class or module. tag: says so in the keys of what is cached meanwhile."""
    theirs = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        with tagged(tag):
            yield
    finally:
        setattr(owner, name, theirs)


@contextlib.contextmanager
def tagged(tag: str) -> Iterator[None]:
    """What is cached inside is not found without the tag."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} {tag}"):
        yield
