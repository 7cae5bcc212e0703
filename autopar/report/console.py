"""What appears on stderr while something runs: the progress line, the training bar, errors."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from autopar.report.units import seconds_text

_REFRESHES_PER_S = 8
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_EVERY_S = 1.0


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


class SearchLine:
    """One line with a spinner, the pass at work, the best plan so far and the seconds so far. Where
    stderr is no terminal, plain lines, at most one per second. Call it with the text of each
    pass."""

    def __init__(
        self, title: str = "planning", *, quiet: bool = False, console: Console | None = None
    ) -> None:
        self._title = title
        self._console = console or stderr_console()
        self._quiet = quiet
        self._live: Live | None = None
        self._process = os.getpid()
        self._started = self._shown = time.monotonic()
        self._last = ""

    def __enter__(self) -> SearchLine:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(
                get_renderable=self._line,
                console=self._console,
                refresh_per_second=_REFRESHES_PER_S,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, text: str) -> None:
        """Cheap: the line is drawn by a clock of its own. Forks of the process are silent."""
        if os.getpid() != self._process:
            return
        self._last = text
        now = time.monotonic()
        plain = self._live is None and not self._quiet
        if plain and now - self._shown >= _PLAIN_EVERY_S:
            self._shown = now
            self._console.print(self._text(), soft_wrap=True)

    def _line(self) -> Text:
        """What the terminal shows now, cut at its width: a line that wraps flickers."""
        frame = _SPINNER[int(time.monotonic() * _REFRESHES_PER_S) % len(_SPINNER)]
        return Text.assemble(f"{frame} ", self._text(), no_wrap=True, overflow="ellipsis")

    def _text(self) -> Text:
        elapsed = seconds_text(round(time.monotonic() - self._started, 1))
        return Text.assemble((self._title, "bold"), f" {elapsed} ", (self._last, "dim"))


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


def show_note(text: str) -> None:
    """A yellow sentence on stderr."""
    stderr_console().print(Text(text, "yellow"))
