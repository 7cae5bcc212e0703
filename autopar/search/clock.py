"""The time of a search: seconds by pass, the deadline, what the user sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str], None]

_LATE = 0.6  # of the limit


@dataclass(slots=True)
class Clock:
    """incumbent: a text about the best plan so far, shown with every pass."""

    limit_s: float
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    incumbent: str = ""

    @contextmanager
    def passes(self, name: str, detail: str = "") -> Iterator[None]:
        self.show(f"{name} {detail}".strip())
        start = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def show(self, text: str) -> None:
        self.progress(f"{text} · {self.incumbent}" if self.incumbent else text)

    @property
    def deadline(self) -> float:
        """Of time.monotonic()."""
        return self.started + self.limit_s

    @property
    def left_s(self) -> float:
        return max(0.05, self.deadline - time.monotonic())

    @property
    def late(self) -> bool:
        """Whether what is left is for a first plan, not for a better one."""
        return time.monotonic() >= self.started + _LATE * self.limit_s

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.deadline
