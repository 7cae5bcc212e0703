"""Work done in a forked process, for operators that may crash or hang on inputs of our making."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from typing import TypeVar

from autopar.errors import AutoparError
from autopar.forks import start, unpickled

T = TypeVar("T")
LIMIT_S = 30.0  # some ten times what a search takes


class Crashed(AutoparError):
    """The work did not return: the text says why."""


def isolated(work: Callable[[], T], limit_s: float) -> T:
    """work() in a fork of this process, on one thread; its result must pickle. Crashed where it
    dies, or takes longer than limit_s. Where there is no fork it is called here."""
    if not hasattr(os, "fork"):
        return work()

    def quietly() -> T:
        faulthandler.disable()  # the parent says what happened
        return work()

    fork = start(quietly)
    in_time = False
    try:
        data, in_time = fork.received(limit_s)
    finally:
        status = fork.end(kill=not in_time)
    if not in_time:
        raise Crashed(f"it takes longer than {limit_s:.0f} s")
    if os.WIFSIGNALED(status):
        raise Crashed(f"it crashes with {signal.Signals(os.WTERMSIG(status)).name}")
    if not data:
        raise Crashed("it ends the process")
    failed, result = unpickled(data)
    if failed:
        raise result
    return result  # type: ignore[no-any-return]
