"""Python's collector of garbage cycles, made to look less often.

Imports make half a million small values and a search makes millions, nearly all of which stay:
going through them again and again takes a fifth of the time of planning a small model.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_SELDOM = 5_000_000  # new objects between two looks, of Python's 700: half a GiB at most


@contextlib.contextmanager
def seldom_collected(*, last: bool = False) -> Iterator[None]:
    """Inside, garbage is looked for after every _SELDOM new objects. One who has switched the
    collector off, or made it look less often still, is left alone.

    last: the process ends afterwards, and what is there by then is never looked at: that takes a
    second after a search, and the memory is given back anyhow.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _SELDOM:
        gc.set_threshold(_SELDOM, *before[1:])
    try:
        yield
    finally:
        if last:
            gc.freeze()
        gc.set_threshold(*before)
