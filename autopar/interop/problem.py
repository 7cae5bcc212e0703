"""The inter-op program and its solution, as arrays and numbers: no graph, no cluster, no torch.

Layers are numbered 0..K-1, submesh choices 0..M-1 (a choice may be more than a shape: several
logical views or policies of one submesh are several choices with the same number of devices).
Seconds.

Only the *sum* of the stages' devices is constrained. That is enough when the choices are (1, 2^k)
inside nodes of 2^p devices and (n, all devices) over whole nodes: any multiset of such submeshes
whose devices sum to the cluster's packs it exactly (Alpa, OSDI'22, theorem 1 in appendix A): whole
nodes first, then powers of two in decreasing order fill each node without a hole. Other choices
need their own argument.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InternalError, OptionError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class InterOpProblem:
    """T* = min over stages of  sum_i t_i + (B - 1) max_i t_i         (Alpa, OSDI'22, eq. 2 and 3)

       t_i = stage_seconds[f-1, first, last, m] + transfer_seconds[first, m]
       f = in_flight[s-1]   when stage i is the s-th from the end
       the stages are consecutive, not empty, hold all K layers, and use exactly D devices

    stage_seconds[f-1, i, j, m]: seconds per microbatch of layers i..j inclusive on submesh m with f
    microbatches in flight, forward and backward, once-per-step work already divided by B; inf where
    that is infeasible (memory) or impossible; entries with j < i are never read. A schedule with
    one in-flight count for all stages needs one row only: in_flight is but an index of rows, and a
    broadcast view will do. transfer_seconds[k, m]: seconds per microbatch that a stage which starts
    at layer k on submesh m spends receiving activations and sending gradients; row 0 is zero.
    """

    num_layers: int  # K
    num_devices: int  # D
    submesh_devices: tuple[int, ...]  # [M]
    num_microbatches: int  # B
    stage_seconds: FloatArray  # [F, K, K, M]
    transfer_seconds: FloatArray  # [K, M]
    in_flight: tuple[int, ...]  # by stages from the end, at least stage_limit of them
    min_stages: int = 1
    max_stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_devices", "num_microbatches"):
            if getattr(self, name) < 1:
                raise InternalError(f"{name} is at least 1: got {getattr(self, name)}")
        if not self.submesh_devices or min(self.submesh_devices) < 1:
            raise InternalError(f"submeshes have devices: got {self.submesh_devices}")
        if (
            not 1
            <= self.min_stages
            <= (self.min_stages if self.max_stages is None else self.max_stages)
        ):
            raise OptionError(
                f"need 1 <= min_stages <= max_stages: got {self.min_stages} and {self.max_stages}"
            )
        _freeze(self)
        rows, need = self.stage_seconds.shape[0], self.stage_limit
        if len(self.in_flight) < need or not all(1 <= f <= rows for f in self.in_flight[:need]):
            raise InternalError(
                f"in_flight has a row of 1..{rows} for each of {need} stages: got {self.in_flight}"
            )

    @property
    def stage_limit(self) -> int:
        """The most stages any solution can have: min(K, D // smallest submesh, max_stages)."""
        limit = min(self.num_layers, self.num_devices // min(self.submesh_devices))
        return limit if self.max_stages is None else min(limit, self.max_stages)

    def with_stages(self, num_stages: int) -> InterOpProblem:
        """The same problem with the number of stages pinned."""
        return replace(self, min_stages=num_stages, max_stages=num_stages)


@dataclass(frozen=True, slots=True)
class StageChoice:
    """Layers first_layer..last_layer inclusive on one submesh choice."""

    first_layer: int
    last_layer: int
    submesh: int
    in_flight: int  # the row of stage_seconds that priced it
    seconds: float  # t_i, per microbatch, transfers included


@dataclass(frozen=True, slots=True)
class SolveStats:
    """How the optimum was proved."""

    num_candidates: int  # distinct values that max_i t_i can take
    num_programs: int  # dynamic programs run, one a probed candidate
    lower_bound_s: float  # no solution is below it; equals seconds when solved exactly


@dataclass(frozen=True, slots=True)
class InterOpSolution:
    """Stages from first to last; seconds = sum t_i + (B - 1) t_max."""

    stages: tuple[StageChoice, ...]
    seconds: float
    t_max: float  # max_i t_i
    stats: SolveStats


def _freeze(problem: InterOpProblem) -> None:
    """Check the arrays and replace them by read-only views."""
    layers, submeshes = problem.num_layers, len(problem.submesh_devices)
    shapes = {"stage_seconds": (layers, layers, submeshes), "transfer_seconds": (layers, submeshes)}
    for name, shape in shapes.items():
        view: FloatArray = np.asarray(getattr(problem, name), dtype=np.float64).view()
        lead = view.shape[:1] if name == "stage_seconds" else ()
        if view.shape != lead + shape or 0 in view.shape:
            raise InternalError(f"{name} ends in shape {shape}: got {view.shape}")
        if not (view >= 0).all():
            raise InternalError(f"{name} is >= 0 or inf everywhere: got a NaN or a negative number")
        view.flags.writeable = False
        object.__setattr__(problem, name, view)
    if problem.transfer_seconds[0].any():
        raise InternalError("transfer_seconds[0] is zero: layer 0 receives from no stage")
