"""Interleaved pipelines made of plain ones: the same submeshes, each with several shorter stages.

A cut of p equal submeshes becomes one of v p stages, stage s on submesh s mod p. Layers are shared
out evenly by their seconds in the tables. Each stage has a v-th of its device's budget, and its
fastest solution has to fit it: where memory binds, more microbatches in flight do not pay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from autopar.candidate import Cut
from autopar.schedule import ScheduleKind
from autopar.search.prices import Prices
from autopar.search.program import Program

_STAGES_PER_WORKER = (2, 4)


def interleaved_cuts(program: Program, prices: Prices, cut: Cut) -> Iterator[Cut]:
    """Of a plain cut, where its stages are on equal submeshes and there are layers enough."""
    workers = cut.num_stages
    if workers < 2 or len(set(cut.submeshes)) > 1 or cut.num_microbatches % workers:
        return
    seconds = _layer_seconds(program, prices, cut)
    for chunks in _STAGES_PER_WORKER:
        if workers * chunks <= program.num_layers:
            yield replace(
                cut,
                first_layers=_even(seconds, workers * chunks),
                submeshes=cut.submeshes * chunks,
                views=cut.views * chunks,
                schedule=ScheduleKind.INTERLEAVED,
                num_workers=workers,
                room=0,
            )


def _layer_seconds(program: Program, prices: Prices, cut: Cut) -> list[float]:
    """Of each layer of the model, on the first stage's view."""
    frontiers = prices.frontiers(cut.views[0][0][1], cut.num_microbatches)
    return [frontiers[kind][0].seconds for kind in program.kind_of_layer]


def _even(seconds: list[float], num_stages: int) -> tuple[int, ...]:
    """First layers of consecutive stages of nearly equal seconds, each with a layer at least."""
    starts_at = np.concatenate([[0.0], np.cumsum(seconds)])
    starts = [0]
    for stage in range(1, num_stages):
        share = starts_at[-1] * stage / num_stages
        nearest = int(np.argmin(np.abs(starts_at - share)))
        low, high = starts[-1] + 1, len(seconds) - (num_stages - stage)
        starts.append(min(max(nearest, low), high))
    return tuple(starts)
