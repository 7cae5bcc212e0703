"""Sums over rows of a few thousand elements, such as those of norms, keep the row in registers.

Inductor does so up to 1024 elements; above, a kernel walks over each row twice, once for its mean
and variance and once for what is made of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from autopar.compile.patches import tagged

MOST_KEPT = 4096  # elements of a row: 16 for each thread of a block of 8 warps


@contextlib.contextmanager
def kept_rows() -> Iterator[None]:
    """For what Inductor compiles inside for GPUs. It has a handler of choices for this."""
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    theirs = type(V.choices).should_use_persistent_reduction

    class _Choices(type(V.choices)):  # type: ignore[misc]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if theirs(features, cooperative_reduction):
                return True
            inner = features.get_reduction_hint() is ReductionHint.INNER
            short = V.graph.sizevars.statically_known_leq(features.reduction_numel, MOST_KEPT)
            return inner and short and not cooperative_reduction

    with V.set_choices_handler(_Choices()), tagged(f"rows of {MOST_KEPT} are kept"):
        yield
