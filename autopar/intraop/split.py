"""Where a fold is best split: under a tight budget its layers may not all be alike.

The relaxation of a budgeted program mixes two of its points, a fast one that takes too many bytes
and one that fits (`intraop.memory`). In layers written out, some are at the one and the others at
the other; in a fold all are at the smaller. Split in two, the first layers of it can be at the fast
point and the others at the small one:

    row of the small point + (bytes of the k layers at the fast one) = limit
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from autopar.intraop.improve import Assignment
from autopar.intraop.problem import IntraOpProblem
from autopar.intraop.stage_problem import Fold, StageProblem


class Split(NamedTuple):
    """The first `layers` of a fold, by its number in the stage, apart from the others."""

    fold: int
    layers: int


def best_split(
    built: StageProblem,
    problem: IntraOpProblem,
    folds: Sequence[Fold],
    points: Sequence[Assignment],
    limit: float,
) -> Split | None:
    """Of the fold in which the mixture's points differ most in bytes; None where they do not differ
    by a layer. problem: that of `built`, whatever its row. points: on the hull. limit: bytes of the
    row that are to be filled."""
    pairs = itertools.product(
        (p for p in points if p.bytes > limit), (p for p in points if p.bytes <= limit)
    )
    mixed = min(pairs, key=lambda pair: _mixed_seconds(pair, limit), default=None)
    if mixed is None or not folds:
        return None
    fast, small = mixed
    more = [0.0] * len(folds)
    for node, m_v, s, t in zip(
        built.nodes, problem.node_bytes, fast.choice, small.choice, strict=True
    ):
        copy = built.copies.get(node.name)
        if copy is not None:
            more[copy.fold] += float(m_v[s] - m_v[t])
    fold = max(range(len(folds)), key=more.__getitem__)
    if more[fold] <= 0:
        return None
    room = limit - small.bytes
    if room > more[fold]:  # what is not in this fold is at the fast point
        room -= fast.bytes - small.bytes - more[fold]
    layers = math.floor(folds[fold].count * room / more[fold])
    return Split(fold, layers) if 0 < layers < folds[fold].count else None


def _mixed_seconds(pair: tuple[Assignment, Assignment], limit: float) -> float:
    """Of the mixture of a fast and a small point that takes `limit` bytes."""
    fast, small = pair
    share = (limit - small.bytes) / (fast.bytes - small.bytes)
    return small.seconds + share * (fast.seconds - small.seconds)
