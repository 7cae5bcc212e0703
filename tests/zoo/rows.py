"""What a model of the zoo is: a row of data, and how it becomes a module and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.models import MODELS

ROWS = 8  # of every batch


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A factory: calling it gives (module, example batch).

    equal_rows:  the loss of a batch is the mean of those of its equal parts. Not so for a
                 contrastive loss or one that balances experts, and with BatchNorm only up to the
                 statistics.
    """

    name: str
    summary: str
    build: Callable[[], tuple[nn.Module, Any]]
    equal_rows: bool = True

    def __call__(self) -> tuple[nn.Module, Any]:
        """Under seed 0, in train mode, without a trace in the global random state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, batch = self.build()
        return module.train(), batch


@dataclass(frozen=True, slots=True)
class Size:
    """A published size: what its configuration changes in the class's defaults, and the length of
    a row (tokens; images have the configuration's own)."""

    millions: float
    length: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


BatchKind = Callable[[Any, int], Mapping[str, Any]]  # (configuration, length of a row)


@dataclass(frozen=True, slots=True)
class Family:
    """A model of transformers: class names are those without Config, and with what it is for.

    tiny:  arguments of the configuration whose sizes a test runs.
    """

    summary: str
    config: str
    model: str
    batch: BatchKind
    tiny: Mapping[str, Any]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    length: int = 16
    equal_rows: bool = True

    def build(self, size: str | None = None) -> tuple[nn.Module, Any]:
        """At a published size, or tiny."""
        arguments, length = self.tiny, self.length
        if size is not None:
            arguments, length = self.sizes[size].config, self.sizes[size].length
        config = getattr(transformers, self.config)(**arguments)
        return getattr(transformers, self.model)(config), self.batch(config, length)


def build_case(name: str) -> tuple[nn.Module, Any]:
    """A hand-written model of benchmarks.models."""
    case = MODELS[name]
    return case.build(), case.batch(ROWS)
