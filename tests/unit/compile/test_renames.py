"""Nodes that get other loops keep what they read, and which write they are behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
from torch._inductor.dependencies import Dep, MemoryDep, ReadWrites, WeakDep
from torch._inductor.scheduler import SchedulerNode
from torch.utils._ordered_set import OrderedSet

from autopar.compile.renames import kept_renames


def reads(*dependencies: Dep) -> ReadWrites:
    return ReadWrites(OrderedSet(dependencies), OrderedSet(), OrderedSet())


def elements(name: str) -> MemoryDep:
    index = sympy.Symbol("i")
    return MemoryDep(name, index, (index,), (sympy.Integer(8),))


def test_reads_stay_behind_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`place` is buf7 since it was written, and buf2 comes before."""
    order = WeakDep("buf2", mutating_buf="buf7")
    made: list[ReadWrites] = []
    node: Any = SimpleNamespace(
        read_writes=reads(elements("buf7"), order),
        mutation_renames={"place": "buf7"},
        set_read_writes=made.append,
    )

    def forgets(self: Any) -> None:
        self.read_writes = reads(elements("place"))

    monkeypatch.setattr(SchedulerNode, "recompute_size_and_body", forgets)
    with kept_renames():
        SchedulerNode.recompute_size_and_body(node)
    assert SchedulerNode.recompute_size_and_body is forgets
    assert made[-1].reads == {elements("buf7"), order}
