"""Jobs that prepare side by side and use the devices one at a time.

Most of a measurement is preparation on the host: planning, compiling. Jobs that are told the same
lock file do that together, and none measures while another one uses the devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch.distributed as dist


class Turns:
    """Of one job. Every rank makes it, and takes its turns in the same order."""

    def __init__(self, path: str | None) -> None:
        """path: of the lock file; without one it is always this job's turn."""
        self._path = path
        # not the job's own group: NCCL would keep the devices busy while it waits
        self._group = None if path is None else dist.new_group(backend="gloo")
        self._taken = False
        self._file: TextIO | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """May be nested. A rank that fails keeps the turn until its process ends, as it keeps its
        memory so long, and the others may never come to a barrier."""
        if self._path is None or self._taken:
            yield
            return
        file = Path(self._path).open("a", encoding="utf-8")  # noqa: SIM115  (see above)
        if dist.get_rank() == 0:
            _lock(file)
        dist.barrier(self._group)
        self._taken, self._file = True, file
        yield
        self._taken, self._file = False, None
        file.close()
        dist.barrier(self._group)


def _lock(file: TextIO) -> None:
    """Waits for whoever has it, and says so: it may take long. Freed by the holder's end."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for the devices: another job has {file.name}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
