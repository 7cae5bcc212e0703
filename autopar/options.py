"""What a user can ask of the search: limits, pins and the objective's surroundings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.errors import OptionError
from autopar.estimate import OptimizerModel
from autopar.intraop.solver import Solver
from autopar.plan import Remat
from autopar.schedule import ScheduleKind
from cost_models import Cluster

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(value: str | float | None) -> float | None:
    """Bytes of "70GiB", "512 MiB" or a number. OptionError otherwise."""
    if value is None:
        return None
    if isinstance(value, (int, float)):
        size = float(value)
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", value)
        if not match or match[2].lower() not in _UNITS or match[1].count(".") > 1:
            raise OptionError(f'a size reads like "70GiB" or 512000000: got {value!r}')
        number = match[1] if match[1] != "." else "nan"
        size = float(number) * _UNITS[match[2].lower()]
    if not 0 < size < math.inf:
        raise OptionError(f"a memory budget is positive and finite: got {value!r}")
    return size


def runs_compiled(cluster: Cluster) -> bool:
    """Whether programs there run as compiled code unless told otherwise: on GPUs."""
    return all(group.device.name != "cpu" for group in cluster.groups)


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """None means that the search decides.

    num_stages:       pipeline stages, each on devices of its own; under schedule=INTERLEAVED the
                      groups of devices, of which each takes several stages.
    mesh_shape:       logical mesh of every stage, such as (2, 4).
    num_microbatches: of a global batch; must divide its rows.
    microbatch_limit: the most microbatches that the search may choose.
    placements:       pattern of canonical parameter names, such as "layers.*.mlp.*", or one name ->
                      layout at rest on the stage's mesh, such as "S0"; the first that fits counts.
    budget_fraction:  share of a device's memory that a plan may use where no budget is given; the
    rest
                      is for the allocator's fragmentation and the communication library's buffers.
    candidates:       how many stage cuts are solved exactly and simulated.
    offload:          whether parameters may rest on the devices' hosts; None: where nothing fits
                      without, and the devices' constants say what it costs.
    compiled:         whether the plan is for programs that run as compiled code, which holds less;
                      None: on GPUs, as they do by default.
    cache:            whether a plan that was found before may be taken, and this one kept.
    """

    num_stages: int | None = None
    mesh_shape: tuple[int, ...] | None = None
    num_microbatches: int | None = None
    microbatch_limit: int | None = None
    schedule: ScheduleKind | None = None
    remat: Remat | None = None
    placements: Mapping[str, str] = field(default_factory=dict)
    budget_fraction: float = 0.9
    solver: Solver = Solver.DUAL
    time_limit_s: float = 120.0
    target_gap: float = 0.01
    candidates: int = 3
    num_layers: int | None = None
    max_axes: int = 2
    offload: bool | None = None
    compiled: bool | None = None
    cache: bool = True
    optimizer: OptimizerModel = field(default_factory=OptimizerModel)

    def __post_init__(self) -> None:
        counts = ("num_stages", "num_microbatches", "microbatch_limit", "num_layers", "candidates")
        for name in (*counts, "max_axes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is at least 1: got {value}")
        if (self.num_microbatches or 0) > (self.microbatch_limit or math.inf):
            raise OptionError(
                f"num_microbatches {self.num_microbatches} is above microbatch_limit "
                f"{self.microbatch_limit}: drop one of them"
            )
        if self.mesh_shape is not None and (not self.mesh_shape or min(self.mesh_shape) < 1):
            raise OptionError(f"mesh_shape has axes of size >= 1: got {self.mesh_shape}")
        if not 0 < self.budget_fraction <= 1:
            raise OptionError(f"budget_fraction lies in (0, 1]: got {self.budget_fraction}")
        if not 0 <= self.target_gap < 1:
            raise OptionError(f"target_gap lies in [0, 1): got {self.target_gap}")
        if not self.time_limit_s > 0:
            raise OptionError(f"time_limit_s is positive: got {self.time_limit_s}")
