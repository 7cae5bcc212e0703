"""Python's collector of garbage cycles, made to look less often.

A search makes millions of small values that stay, and imports make half a million more; going
through them again and again takes a fifth of the time of planning a small model.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

_SELDOM = 500_000  # new objects between two looks, of Python's 700


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Inside, garbage is looked for after every _SELDOM new objects. One who has switched the
    collector off, or made it look less often still, is left alone."""
    before = gc.get_threshold()
    if 0 < before[0] < _SELDOM:
        gc.set_threshold(_SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def not_collected_at_exit() -> None:
    """When this process ends no more garbage is looked for: that takes a second after a search, and
    the memory is given back anyhow."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
