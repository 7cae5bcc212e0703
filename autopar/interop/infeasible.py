"""Say what binds when no cut of the layers into stages is feasible, and the way out.

Tried in this order, each by relaxing one thing: a layer that fits on nothing, the sum of the
devices, the number of stages, the microbatches in flight. Input: the problem, and a function that
gives the feasible numbers of stages within a problem's pins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autopar.interop.problem import InterOpProblem

FeasibleCounts = Callable[[InterOpProblem], list[int]]


def explain_infeasible(problem: InterOpProblem, feasible_counts: FeasibleCounts) -> str:
    """The text of NoFeasiblePlan. A few dynamic programs."""
    sizes = ", ".join(map(str, sorted(set(problem.submesh_devices))))
    devices = " + ".join(map(str, problem.num_devices))
    stages = _stage_range(problem)
    if not feasible_counts(_free(problem)):
        return (
            f"no {stages} of {problem.num_layers} layers on submeshes of {sizes} devices use "
            f"exactly {devices} devices. Change the pinned number of stages or the submesh sizes."
        )
    if (blocked := _blocked_layers(problem)).size:
        return (
            f"layer {blocked[0]} fits in no stage on any submesh of {sizes} devices with "
            f"{_used(problem)} microbatches in flight ({blocked.size} of {problem.num_layers} "
            "layers fit in none). Raise the memory budget or num_microbatches, allow remat, or add "
            "devices."
        )
    unpinned = _unpinned(problem)
    if counts := feasible_counts(unpinned):
        return (
            f"{stages} cannot fit, but {', '.join(map(str, counts))} can: the pin on the number "
            "of stages binds. Drop it or move it."
        )
    least = min(problem.in_flight[: problem.stage_limit])
    lightest = replace(problem, in_flight=(least,) * problem.stage_limit)
    if feasible_counts(lightest):
        return (
            f"every layer fits somewhere, but not with {_used(problem)} microbatches in flight: "
            f"with {least} in every stage a plan exists. Use a schedule with fewer "
            "in flight, raise num_microbatches (smaller ones), allow remat, or add devices."
        )
    return (
        f"every layer fits in some stage, but no cut into {stages} fits as a whole on "
        f"{devices} devices (submeshes of {sizes}). Raise the memory budget or "
        "num_microbatches, allow remat, or add devices."
    )


def _blocked_layers(problem: InterOpProblem) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Layers that lie in no finite stage on any submesh, in flight as used."""
    fits = np.zeros((problem.num_layers, problem.num_layers), dtype=bool)
    for f in sorted(set(problem.in_flight[: problem.stage_limit])):
        fits |= np.isfinite(problem.row(f) + problem.transfer_seconds[:, None]).any(axis=2)
    fits = np.triu(fits)
    covered = np.array([fits[: k + 1, k:].any() for k in range(problem.num_layers)])
    return np.flatnonzero(~covered)


def _free(problem: InterOpProblem) -> InterOpProblem:
    """Every stage feasible and free: what is left are the devices and the pins."""
    zero, (layers, submeshes) = np.zeros(()), problem.transfer_seconds.shape
    return replace(
        problem,
        stage_seconds=np.broadcast_to(zero, (1, layers, layers, submeshes)),
        transfer_seconds=np.broadcast_to(zero, (layers, submeshes)),
        in_flight=(1,) * problem.stage_limit,
    )


def _unpinned(problem: InterOpProblem) -> InterOpProblem:
    """Any number of stages that in_flight and its rows are known for."""
    rows = len(problem.stage_seconds)
    unknown = [s for s, f in enumerate(problem.in_flight) if not 1 <= f <= rows]
    return replace(problem, min_stages=1, max_stages=min([*unknown, len(problem.in_flight)]))


def _stage_range(problem: InterOpProblem) -> str:
    low, high = problem.min_stages, max(problem.stage_limit, problem.min_stages)
    if low == high:
        return "1 stage" if low == 1 else f"{low} stages"
    return f"{low} to {high} stages"


def _used(problem: InterOpProblem) -> str:
    counts = sorted(set(problem.in_flight[: problem.stage_limit]))
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
