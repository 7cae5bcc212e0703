"""The zoo: 31 tiny models on which parallel and single-device steps are compared.

Each factory returns ``(module, example_batch)``: random weights under a fixed seed, train mode,
dropout on where the model has it, batch 8, and sizes that a plan may shard divisible by 4. Calling
one leaves the global random state as it was. Where rows of a batch weigh the same in the loss
(``equal_rows``), the mean over equal microbatches is the loss of the whole batch; BatchNorm's
statistics are those of a microbatch, though.

A step is a function of the seed: whatever draws random numbers in Python or on the device other
than dropout (layers that are skipped, SpecAugment, jitter of a router, stochastic depth) is off.
Hugging Face models take a dict and return ``.loss``; the others take a tuple and return the loss.

On the command line a model of the zoo has its name: ``gpt2``. `SIZES` are the published sizes of
the same models, for planning without memory (``opt-6.7b``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

from tests.zoo.language import DECODERS, ENCODER_DECODERS, ENCODERS, EXPERTS
from tests.zoo.rows import ROWS, Family, ZooModel, build_case
from tests.zoo.vision import VISION

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {**DECODERS, **EXPERTS, **ENCODER_DECODERS, **ENCODERS, **VISION}
)

# Hand-written models of benchmarks.models, whose published sizes are listed there.
_OWN = (
    ("wide_resnet", "wresnet-tiny", "four bottlenecks with BatchNorm", False),
    ("unet", "unet-tiny", "diffusion U-Net of two levels: skips, GroupNorm, attention", True),
    ("gshard_moe", "moe-tiny", "two of four blocks with top-2 experts and a balance loss", True),
    ("dlrm", "dlrm-tiny", "embedding tables, dot interaction of the features", True),
)


def _models() -> Iterator[ZooModel]:
    for name, row in FAMILIES.items():
        yield ZooModel(name, row.summary, row.build, row.equal_rows)
    for name, case, summary, equal_rows in _OWN:
        yield ZooModel(name, summary, partial(build_case, case), equal_rows)


def _sizes() -> Iterator[ZooModel]:
    for name, row in FAMILIES.items():
        for key, size in row.sizes.items():
            rows = f", {ROWS} rows of {size.length} tokens" if size.length else f", {ROWS} images"
            summary = f"{name} with {size.millions:,.0f} million parameters{rows}"
            yield ZooModel(key, summary, partial(row.build, key), row.equal_rows)


ZOO: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _models()})
SIZES: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _sizes()})

# One of each kind, for tests that run every plan or every signature of a model.
CORE: Mapping[str, ZooModel] = MappingProxyType(
    {
        name: ZOO[name]
        for name in ("gpt2", "llama", "bert", "vit", "t5", "wide_resnet", "unet", "gshard_moe")
    }
)
