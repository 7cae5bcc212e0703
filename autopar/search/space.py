"""What one search may choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.mesh import LogicalMesh, Submesh
from autopar.options import SearchOptions
from autopar.plan import Remat
from autopar.schedule import ScheduleKind
from cost_models import Cluster

WEIGHT_SHARE = 0.3  # of a stage's seconds are gradients of weights, which fill bubbles: about so


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """microbatch_counts: rising. views: of each submesh. policies: from the one that recomputes
    least. schedules: those allowed. budgets: bytes per device of each node group."""

    cluster: Cluster
    options: SearchOptions
    microbatch_counts: tuple[int, ...]
    submeshes: tuple[Submesh, ...]
    views: Mapping[Submesh, tuple[LogicalMesh, ...]]
    policies: tuple[Remat, ...]
    schedules: tuple[ScheduleKind, ...]
    budgets: tuple[float, ...]

    @property
    def table_schedule(self) -> ScheduleKind:
        """Whose bytes in flight the tables use. Cuts are made for 1F1B where it, or what is made of
        it, is allowed."""
        others = (ScheduleKind.GPIPE, ScheduleKind.ZB_H1)
        first = self.schedules[0]
        return first if first in others else ScheduleKind.ONE_F_ONE_B

    @property
    def bubble(self) -> float:
        """What the best schedule leaves of the time in which a pipeline fills and drains."""
        return 1 - 2 * WEIGHT_SHARE if ScheduleKind.ZB_H1 in self.schedules else 1.0

    def budget_of(self, view: LogicalMesh) -> float:
        """Bytes per device that a plan may use there."""
        return self.budgets[view.group]
