"""What appears on stdout: text, tables, JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, RenderableType

_FILE_WIDTH = 120  # columns where stdout is no terminal


def stdout_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def show(what: RenderableType) -> None:
    """Text as it is, anything else as rich draws it."""
    if isinstance(what, str):
        sys.stdout.write(what + "\n")
    else:
        stdout_console().print(what)


def show_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")
