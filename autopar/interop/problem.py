"""The inter-op program and its solution, as arrays and numbers: no graph, no cluster, no torch.

Layers are numbered 0..K-1, node groups 0..G-1, submesh choices 0..M-1 (a choice may be more than a
shape: several logical views or policies of one submesh are several choices with the same number of
devices of the same group). Seconds.

Only the *sum* of the stages' devices is constrained, for each group. That is enough when the
choices are (1, n) inside nodes, where each n divides the next and the last one the node, and
(n, all devices) over whole nodes: any multiset of such submeshes whose devices sum to the group's
packs it exactly (Alpa, OSDI'22, theorem 1 in appendix A): whole nodes first, then the larger sizes
before the smaller ones fill each node without a hole. A submesh lies in one group, so packing one
group says nothing about another, and the argument holds for each. Other choices need their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InternalError, OptionError

FloatArray = NDArray[np.float64]


class StageRows(Protocol):
    """A table [K, K, M] for each count of microbatches in flight: an array [F, K, K, M], or rows
    that are made when they are asked for. Solving asks for each row that it uses once."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> FloatArray: ...


@dataclass(frozen=True, slots=True, eq=False)
class InterOpProblem:
    """T* = min over stages of  b sum_i t_i + (B - b) max_i t_i

       b = bubble: what a schedule leaves of the time in which the pipeline fills and drains; with
       b = 1, as in 1F1B, this is Alpa's (OSDI'22, eq. 2 and 3)
       t_i = stage_seconds[f-1][first, last, m] + transfer_seconds[first, m]
       f = in_flight[s-1]   when stage i is the s-th from the end
       the stages are consecutive, not empty, hold all K layers, and use exactly the D_g devices of
       each group g

    stage_seconds[f-1][i, j, m]: seconds per microbatch of layers i..j inclusive on submesh m with f
    microbatches in flight, forward and backward, once-per-step work already divided by B; inf where
    that is infeasible (memory) or impossible; entries with j < i are never read. A schedule with
    one in-flight count for all stages needs one row only: in_flight is but an index of rows.
    Layers that are all equal need no memory: a strided view of [n, M] will do.
    transfer_seconds[k, m]: seconds per microbatch that a stage which starts at layer k on submesh m
    spends receiving activations and sending gradients; row 0 is zero.
    """

    num_layers: int  # K
    num_devices: tuple[int, ...]  # [G]
    submesh_devices: tuple[int, ...]  # [M]
    num_microbatches: int  # B
    stage_seconds: StageRows  # [F][K, K, M]
    transfer_seconds: FloatArray  # [K, M]
    in_flight: tuple[int, ...]  # by stages from the end, at least stage_limit of them
    submesh_groups: tuple[int, ...] = ()  # [M], 0 unless given
    min_stages: int = 1
    max_stages: int | None = None
    bubble: float = 1.0  # b, in (0, 1]

    def __post_init__(self) -> None:
        for name, values in (
            ("num_layers", (self.num_layers,)),
            ("num_devices", self.num_devices),
            ("num_microbatches", (self.num_microbatches,)),
        ):
            if min(values, default=0) < 1:
                raise InternalError(f"{name} is at least 1: got {getattr(self, name)}")
        if not self.submesh_devices or min(self.submesh_devices) < 1:
            raise InternalError(f"submeshes have devices: got {self.submesh_devices}")
        if not self.submesh_groups:
            object.__setattr__(self, "submesh_groups", (0,) * len(self.submesh_devices))
        if len(self.submesh_groups) != len(self.submesh_devices) or not all(
            0 <= group < len(self.num_devices) for group in self.submesh_groups
        ):
            raise InternalError(
                f"each of {len(self.submesh_devices)} submeshes is of one of "
                f"{len(self.num_devices)} groups: got {self.submesh_groups}"
            )
        if (
            not 1
            <= self.min_stages
            <= (self.min_stages if self.max_stages is None else self.max_stages)
        ):
            raise OptionError(
                f"need 1 <= min_stages <= max_stages: got {self.min_stages} and {self.max_stages}"
            )
        if not 0 < self.bubble <= 1:
            raise InternalError(f"bubble is in (0, 1]: got {self.bubble}")
        shape = (self.num_layers, len(self.submesh_devices))
        transfers = _checked(self.transfer_seconds, shape, "transfer_seconds")
        if transfers[0].any():
            raise InternalError("transfer_seconds[0] is zero: layer 0 receives from no stage")
        object.__setattr__(self, "transfer_seconds", transfers)
        rows, need = len(self.stage_seconds), self.stage_limit
        if len(self.in_flight) < need or not all(1 <= f <= rows for f in self.in_flight[:need]):
            raise InternalError(
                f"in_flight has a row of 1..{rows} for each of {need} stages: got {self.in_flight}"
            )

    def row(self, in_flight: int) -> FloatArray:
        """Seconds [K, K, M] with so many microbatches in flight, checked."""
        shape = (self.num_layers, self.num_layers, len(self.submesh_devices))
        return _checked(self.stage_seconds[in_flight - 1], shape, "a row of stage_seconds")

    @property
    def stage_limit(self) -> int:
        """The most stages any solution can have: by layers, by the devices of each group in its
        smallest submeshes, by max_stages."""
        most = 0
        for group, devices in enumerate(self.num_devices):
            sizes = zip(self.submesh_groups, self.submesh_devices, strict=True)
            most += devices // min((n for g, n in sizes if g == group), default=devices + 1)
        limit = min(self.num_layers, most)
        return limit if self.max_stages is None else min(limit, self.max_stages)

    @property
    def fill(self) -> float:
        """(B - b) / b: how often the slowest stage counts for each time that all of them do."""
        return self.num_microbatches / self.bubble - 1

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
    """Stages from first to last; seconds = b sum t_i + (B - b) t_max."""

    stages: tuple[StageChoice, ...]
    seconds: float
    t_max: float  # max_i t_i
    stats: SolveStats


def _checked(values: FloatArray, shape: tuple[int, ...], name: str) -> FloatArray:
    """A read-only view of seconds of this shape."""
    view: FloatArray = np.asarray(values, dtype=np.float64).view()
    if view.shape != shape:
        raise InternalError(f"{name} has shape {shape}: got {view.shape}")
    if not (view >= 0).all():
        raise InternalError(f"{name} is >= 0 or inf everywhere: got a NaN or a negative number")
    view.flags.writeable = False
    return view
