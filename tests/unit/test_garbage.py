"""The collector of cycles looks less often inside, and as before afterwards."""

from __future__ import annotations

import gc

from autopar.garbage import seldom_collected


def test_the_threshold_is_put_back_and_never_lowered() -> None:
    before = gc.get_threshold()
    try:
        for given, inside in (
            ((700, 10, 10), 5_000_000),
            ((0, 10, 10), 0),
            ((6_000_000, 5, 5), 6_000_000),
        ):
            gc.set_threshold(*given)
            with seldom_collected():
                assert gc.get_threshold() == (inside, *given[1:])
            assert gc.get_threshold() == given
    finally:
        gc.set_threshold(*before)


def test_what_is_there_before_the_process_ends_is_not_looked_at() -> None:
    try:
        with seldom_collected():
            pass
        assert gc.get_freeze_count() == 0
        with seldom_collected(last=True):
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
