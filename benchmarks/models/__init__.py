"""The models that benchmarks and tests run, by name: ``MODELS["gpt-1.3b"]``.

A :class:`ModelCase` joins a module's factory with its batches and with what throughput counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn

from benchmarks.models import dlrm, gpt, llama, moe, t5, unet, wide_resnet


class ItemKind(StrEnum):
    """What throughput counts."""

    TOKENS = "tokens"
    IMAGES = "images"
    SAMPLES = "samples"


@dataclass(frozen=True, slots=True)
class ModelCase:
    """One model at one size.

    ``build`` makes the module (under ``torch.device("meta")``: without memory); its forward takes
    the tensors of ``batch(batch_size)`` and returns the scalar loss. One row of a batch holds
    ``items_per_sample`` of ``kind``. ``model_flops_per_sample`` counts forward and backward,
    nothing recomputed.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    kind: ItemKind
    items_per_sample: int
    model_flops_per_sample: Callable[[], float]


def _language_cases() -> list[ModelCase]:
    cases = []
    for module, factory in ((gpt, gpt.GPT), (llama, llama.Llama), (moe, moe.MoE)):
        for name, config in module.CONFIGS.items():
            cases.append(
                ModelCase(
                    name=name,
                    build=partial(factory, config),
                    batch=partial(module.example_batch, config),
                    kind=ItemKind.TOKENS,
                    items_per_sample=config.seq_len,
                    model_flops_per_sample=partial(module.flops_per_sample, config),
                )
            )
    for name, config in t5.CONFIGS.items():
        cases.append(
            ModelCase(
                name=name,
                build=partial(t5.T5, config),
                batch=partial(t5.example_batch, config),
                kind=ItemKind.TOKENS,
                items_per_sample=config.source_len + config.target_len,
                model_flops_per_sample=partial(t5.flops_per_sample, config),
            )
        )
    return cases


def _sample_cases() -> list[ModelCase]:
    modules = (
        (wide_resnet, wide_resnet.WideResNet, ItemKind.IMAGES),
        (unet, unet.UNet, ItemKind.IMAGES),
        (dlrm, dlrm.DLRM, ItemKind.SAMPLES),
    )
    return [
        ModelCase(
            name=name,
            build=partial(factory, config),
            batch=partial(module.example_batch, config),
            kind=kind,
            items_per_sample=1,
            model_flops_per_sample=partial(module.flops_per_sample, config),
        )
        for module, factory, kind in modules
        for name, config in module.CONFIGS.items()
    ]


MODELS: Mapping[str, ModelCase] = MappingProxyType(
    {case.name: case for case in (*_language_cases(), *_sample_cases())}
)
