"""What reads a value after it was written in place stays behind that write.

Inductor's backend for CPUs gives nodes that it fuses other loops, and finds out anew what they
read: the memory, but no longer which write to it. Such a node may then run before the write, and
reads what was there (pytorch/pytorch#185509, mended after 2.13; 2.11 forgets orders that no read
tells, too): of a place that ranks write into, what another gradient had left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from autopar.compile.patches import replaced


@contextlib.contextmanager
def kept_renames() -> Iterator[None]:
    """For what Inductor compiles inside."""
    from torch._inductor import dependencies, scheduler

    node: Any = scheduler.SchedulerNode
    theirs = node.recompute_size_and_body
    orders = (dependencies.WeakDep, dependencies.StarDep)  # are not found in loops

    def ours(self: Any, *args: Any, **kwargs: Any) -> None:
        found = [dep for dep in self.read_writes.reads if isinstance(dep, orders)]
        theirs(self, *args, **kwargs)
        made = self.read_writes
        for dep in found:
            made = made.with_read(dep)
        self.set_read_writes(made.rename(self.mutation_renames))

    with replaced(node, "recompute_size_and_body", ours, "renames are kept"):
        yield
