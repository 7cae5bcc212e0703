"""The families of rules. Each module holds rows: operator overload -> rule function."""

import autopar.ops  # noqa: F401  registers autopar's own operators, which families name
from autopar.sharding.rules import (
    attention,
    contraction,
    creation,
    experts,
    indexing,
    loss,
    normalisation,
    pointwise,
    pooling,
    reduction,
    slicing,
    views,
)

FAMILIES = {
    "contraction": contraction.RULES,
    "pointwise": pointwise.RULES,
    "view": views.RULES,
    "reduction": reduction.RULES,
    "normalisation": normalisation.RULES,
    "attention": attention.RULES,
    "experts": experts.RULES,
    "indexing": indexing.RULES,
    "loss": loss.RULES,
    "slicing": slicing.RULES,
    "pooling": pooling.RULES,
    "creation": creation.RULES,
}
