"""The progress line, on a terminal and elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from autopar.report import console as module
from autopar.report.console import SearchLine
from autopar.search.clock import Clock


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    yield now


def line(*, terminal: bool, quiet: bool = False) -> tuple[SearchLine, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60, color_system=None)
    return SearchLine("planning x", quiet=quiet, console=console), out


def test_elsewhere_it_is_at_most_one_plain_line_per_second(seconds: list[float]) -> None:
    shown, out = line(terminal=False)
    with shown:
        for _ in range(50):
            seconds[0] += 0.1
            shown("exact stages 2 stage(s) · best so far 3.08 ms")
    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 5
    assert lines[0].endswith(" s exact stages 2 stage(s) · best so far 3.08 ms")


def test_a_quick_search_and_a_quiet_one_show_nothing(seconds: list[float]) -> None:
    shown, out = line(terminal=False)
    with shown:
        shown("capture")
    assert out.getvalue() == ""
    shown, out = line(terminal=True, quiet=True)
    with shown:
        seconds[0] += 5
        shown("capture")
    assert out.getvalue() == ""


def test_on_a_terminal_it_is_one_line_that_is_gone_in_the_end() -> None:
    shown, out = line(terminal=True)
    with shown:
        shown("a pass whose text is much longer than the terminal is wide, so that it is cut")
        assert shown._live is not None
        shown._live.refresh()
    text = out.getvalue()
    assert "planning x" in text and "…" in text
    assert "planning x" not in text[text.rindex("\x1b[2K") :]


def test_the_clock_shows_every_pass_with_the_best_plan_so_far() -> None:
    shown: list[str] = []
    clock = Clock(60.0, shown.append)
    with clock.passes("stage cut", "2 microbatch(es)"):
        pass
    clock.incumbent = "best so far 3.08 ms"
    with clock.passes("exact stages"):
        pass
    assert shown == ["stage cut 2 microbatch(es)", "exact stages · best so far 3.08 ms"]
