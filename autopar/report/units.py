"""Numbers as people read them: SI for seconds, binary prefixes for bytes. Inside, all is SI."""

from __future__ import annotations

from collections.abc import Sequence

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_COUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def number_text(value: float) -> str:
    """Three significant digits: 1.23, 45.6, 789; whole above that."""
    for limit, digits in ((9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def seconds_text(seconds: float) -> str:
    """ "5.88 ms"; minutes from 100 s on, "2 min 5 s"."""
    if seconds == 0:
        return "0 s"
    if seconds >= 99.95:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for unit_s, name in _TIMES:
        if seconds >= 0.9995 * unit_s or name == "ns":
            return f"{number_text(seconds / unit_s)} {name}"
    raise AssertionError


def bytes_text(nbytes: float) -> str:
    """ "1.50 GiB"."""
    for unit, name in _SIZES:
        if nbytes >= 0.9995 * unit:
            return f"{number_text(nbytes / unit)} {name}"
    return f"{nbytes:.0f} B"


def flops_text(flops: float) -> str:
    """ "1.50 T": a count of operations, not a rate."""
    for unit, name in _COUNTS:
        if flops >= 0.9995 * unit:
            return f"{number_text(flops / unit)} {name}"
    return f"{flops:.0f}"


def percent_text(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def bar_text(fraction: float, width: int = 20) -> str:
    """A bar of `width` cells, full at 1; any use at all shows one cell."""
    filled = min(width, max(round(fraction * width), 1 if fraction > 0 else 0))
    return "█" * filled + "░" * (width - filled)


def mesh_text(axis_sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, axis_sizes))


def range_text(values: Sequence[int]) -> str:
    """Runs of consecutive integers: "0-7", "0-3, 8-11"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
