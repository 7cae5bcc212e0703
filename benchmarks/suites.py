"""The suites as tables: what is measured, frozen, so that results of different days compare.

A new case is a new row; a row that has results is never changed, only followed by another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autopar.errors import OptionError
from benchmarks.models import MODELS, ItemKind

HF_GPT2 = "hf-gpt2-124m"


@dataclass(frozen=True, slots=True)
class PlanCase:
    """Plan a model for a cluster. batch: rows of the global batch. options: of SearchOptions."""

    name: str
    model: str
    cluster: str
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpeedCase:
    """Train a model. batch: rows of the global batch, for any number of devices."""

    name: str
    model: str
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)


PLAN_CASES: tuple[PlanCase, ...] = (
    PlanCase("gpt2-124m", HF_GPT2, "h100:1x8", 64),
    PlanCase("gpt2-124m-2x4", HF_GPT2, "h100:1x8", 64, {"num_stages": 1, "mesh_shape": (2, 4)}),
    PlanCase("gpt-1.3b", "gpt-1.3b", "h100:1x8", 64),
    PlanCase("gpt-39b", "gpt-39b", "v100:8x8", 1024, {"num_microbatches": 64}),
    PlanCase("llama-8l", "llama-8l", "h100:1x2", 8),
    PlanCase("llama-3-8b", "llama-3-8b", "h100:1x8", 16),
    PlanCase("moe-2.4b", "moe-2.4b", "v100:1x8", 64),
    PlanCase("t5-large", "t5-large", "h100:1x8", 64),
    PlanCase("wresnet-250m", "wresnet-250m", "v100:1x8", 64),
    PlanCase("unet-860m", "unet-860m", "h100:1x8", 16),
    PlanCase("gpt-tiny", "gpt-tiny", "cpu:1x4", 8),
)

SPEED_CASES: tuple[SpeedCase, ...] = (
    SpeedCase("gpt-tiny", "gpt-tiny", 8),
    SpeedCase("llama-tiny", "llama-tiny", 8),
    SpeedCase("gpt-124m", "gpt-124m", 8),
    SpeedCase("gpt-1.3b", "gpt-1.3b", 16),
    SpeedCase("gpt-1.3b-b32", "gpt-1.3b", 32),
    SpeedCase("llama-8l", "llama-8l", 4),
    SpeedCase("llama-8l-b8", "llama-8l", 8),
    SpeedCase("moe-380m", "moe-380m", 16),
    SpeedCase("wresnet-250m", "wresnet-250m", 64),
    SpeedCase("unet-860m", "unet-860m", 8),
    SpeedCase("t5-large", "t5-large", 16),
    SpeedCase("llama-24l-b2", "llama-24l", 2),
    SpeedCase("llama-24l", "llama-24l", 4),
    SpeedCase("llama-24l-b8", "llama-24l", 8),
    SpeedCase("moe-2.4b", "moe-2.4b", 16),
    SpeedCase("wresnet-1b", "wresnet-1b", 64),
    SpeedCase("gpt-124m-b16", "gpt-124m", 16),
    SpeedCase("moe-tiny", "moe-tiny", 8),
    SpeedCase("t5-tiny", "t5-tiny", 8),
    SpeedCase("wresnet-tiny", "wresnet-tiny", 8),
    SpeedCase("unet-tiny", "unet-tiny", 8),
)
# A model of the same kind that two CPU processes train in seconds.
TWINS: Mapping[str, str] = {
    "gpt": "gpt-tiny",
    "llama": "llama-tiny",
    "moe": "moe-tiny",
    "wresnet": "wresnet-tiny",
    "unet": "unet-tiny",
    "t5": "t5-tiny",
}

Case = PlanCase | SpeedCase
SUITES: Mapping[str, Sequence[Case]] = {"plan": PLAN_CASES, "speed": SPEED_CASES}


def select(suite: str, names: str) -> tuple[Case, ...]:
    """Cases by comma-separated names, or "all". OptionError lists what there is."""
    if suite not in SUITES:
        raise OptionError(f"no suite is called {suite!r}: there are {', '.join(SUITES)}")
    cases = {case.name: case for case in SUITES[suite]}
    if names == "all":
        return tuple(cases.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in cases]
    if unknown or not wanted:
        raise OptionError(
            f"suite {suite} has no case {', '.join(unknown) or names!r}: it has {', '.join(cases)}"
        )
    return tuple(cases[name] for name in wanted)


def build(model: str, batch: int) -> tuple[nn.Module, Any]:
    """A model in train mode under seed 0 and a batch of so many rows; on meta under its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if model == HF_GPT2:
            return _hf_gpt2(batch)
        case = MODELS[model]
        return case.build().train(), case.batch(batch)


def build_batch(model: str, batch: int) -> Any:
    """The batch of a model of MODELS alone, under seed 0, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[model].batch(batch)


def items_per_batch(case: SpeedCase) -> tuple[int, ItemKind]:
    """How many tokens or images one step trains on."""
    model = MODELS[case.model]
    return model.items_per_sample * case.batch, model.kind


def _hf_gpt2(batch: int) -> tuple[nn.Module, Any]:
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = transformers.GPT2Config(use_cache=False)
    tokens = torch.randint(config.vocab_size, (batch, config.n_positions))
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}
