"""Collectives of a real job: NCCL's or gloo's, waited for at once."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.lowering.collectives import WAIT, functional, start
from autopar.runtime.interpreter import Shards


class ProcessCollectives:
    """Collectives of one rank, as functional collectives on the groups of its mesh axes."""

    def __init__(self, groups: Sequence[tuple[str, int]]) -> None:
        """groups: name and size, by axis."""
        self._groups = tuple(groups)

    def run(self, op: str, shards: Shards, axis: int, reduce: str) -> Shards:
        name, size = self._groups[axis]
        return [WAIT(start(op, shard, name, size, reduce)) for shard in shards]

    def exchange(self, rows: Shards, sends: Shards, receives: Shards, axis: int) -> Shards:
        outgoing, incoming = sends[0].tolist(), receives[0].tolist()
        shard = rows[0][: sum(outgoing)].contiguous()
        name, _ = self._groups[axis]
        result = functional.all_to_all_single(shard, incoming, outgoing, name)
        return [WAIT(result)]
