"""Which layers of a stage recompute: as many as the tables' mixture says that it takes to fit, or
more or fewer of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autopar.intraop.compose import (
    Frontier,
    eased_mixture,
    smallest_points,
    stage_mixture,
)
from autopar.plan import Remat

_ROOM = 0.98  # of the budget: what the layers are mixed for, as a stage has more than its layers


def stage_policies(
    frontiers: Sequence[Frontier],
    kinds: Sequence[int],
    in_flight: int,
    budget_bytes: float,
    *,
    extra: float,
    least: Remat,
) -> list[Remat]:
    """Of each layer of a stage; its first ones recompute most. frontiers: of each class. kinds: the
    class of each layer. extra: share of the layers that recompute more than the tables say, fewer
    of them where it is negative. least: the policy that recomputes least."""
    counts = np.bincount(kinds, minlength=len(frontiers))
    mixture = stage_mixture(frontiers, counts, in_flight, _ROOM * budget_bytes)
    if mixture is None:
        mixture = stage_mixture(frontiers, counts, in_flight, math.inf)
        assert mixture is not None
    if extra < 0:
        layers = -extra * len(kinds)
        mixture = eased_mixture(frontiers, counts, in_flight, mixture, layers)
    fast, small, share = mixture
    if extra <= -1 and not share:
        fast = _under(least, frontiers)
    if extra > 0:
        smallest = smallest_points(frontiers, counts, in_flight)
        if not share:  # all fit with their fast points, say the tables, or none fit at all
            small = smallest
        if share + extra > 1:
            fast, small, share = small, smallest, share + extra - 1
        else:
            share += extra
    chosen = []
    seen = [0] * len(frontiers)
    for kind in kinds:
        some = math.ceil(min(1.0, share) * counts[kind] - 1e-9)
        chosen.append((small if seen[kind] < some else fast)[kind].remat)
        seen[kind] += 1
    return chosen


def _under(policy: Remat, frontiers: Sequence[Frontier]) -> Frontier:
    """Of each class a point under the policy, if there is one."""
    return tuple(next((p for p in f if p.remat is policy), f[0]) for f in frontiers)
