"""The strategies of single operators, for `autopar show PLAN --operators PATTERN`."""

from __future__ import annotations

import re

from rich.table import Table

from autopar.plan import ParallelPlan
from autopar.report.units import mesh_text


def operator_table(plan: ParallelPlan, pattern: re.Pattern[str]) -> Table:
    """Every operator whose name has a match of the pattern, stage by stage."""
    table = Table("stage", "mesh", "operator", "factor per mesh axis", box=None)
    found = 0
    for index, stage in enumerate(plan.stages):
        for name, text in stage.strategies.items():
            if pattern.search(name):
                table.add_row(str(index), mesh_text(stage.axis_sizes), name, text)
                found += 1
    total = sum(len(stage.strategies) for stage in plan.stages)
    table.caption = f"{found} of {total} operators; - is replicated on that axis"
    table.caption_justify = "left"
    return table
