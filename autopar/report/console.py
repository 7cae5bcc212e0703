"""What appears on stderr while something runs: the progress line, the training bar, errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status
from rich.text import Text

from autopar.report.units import seconds_text


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


class SearchLine:
    """One line with a spinner, the pass at work and the seconds so far; a plain line per pass where
    stderr is no terminal and `plain` is asked for. Call it with the text of each pass."""

    def __init__(self, title: str = "planning", *, quiet: bool = False) -> None:
        self._title = title
        self._console = stderr_console()
        self._status: Status | None = None
        self._live = self._console.is_terminal and not quiet
        self._started = time.monotonic()
        self._last = ""

    def __enter__(self) -> SearchLine:
        if self._live:
            self._status = self._console.status(self._text())
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, text: str) -> None:
        self._last = text
        if self._status is not None:
            self._status.update(self._text())

    def _text(self) -> Text:
        elapsed = seconds_text(time.monotonic() - self._started)
        return Text.assemble((self._title, "bold"), f" {self._last} ", (elapsed, "dim"))


class TrainingBar:
    """A progress bar over steps with the loss."""

    def __init__(self, progress: Progress, num_steps: int, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=num_steps, loss="")

    def advance(self, loss: float) -> None:
        self._progress.update(self._task, advance=1, loss=f"loss {loss:.6f}")


@contextmanager
def training_bar(
    num_steps: int, title: str = "training", *, shown: bool = True
) -> Iterator[TrainingBar]:
    """On stderr. Where stderr is no terminal, the bar appears once, at its end."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=stderr_console(), disable=not shown) as progress:
        yield TrainingBar(progress, num_steps, title)


def show_error(kind: str, message: str) -> None:
    """One panel on stderr, no traceback."""
    panel = Panel(Text(message), title=kind, title_align="left", border_style="red")
    sys.stdout.flush()
    stderr_console().print(panel)
