"""Checked values out of TOML and JSON records, and the immutable mapping that keeps them.

A *record* is a plain mapping as `tomllib` or `json` gives it. Every function takes `where`, the
words by which an error names the record, and raises `HardwareError`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TypeVar

from cost_models.errors import HardwareError

V = TypeVar("V")


class FrozenMap(Mapping[str, V]):
    """An immutable, hashable mapping: what a frozen dataclass holds instead of a dict."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, V]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"FrozenMap({self._entries!r})"


def as_record(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise HardwareError(f"{where} must be a table of named values; got {value!r}.")
    return value


def as_list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise HardwareError(f"{where} must be a list; got {value!r}.")
    return value


def as_float(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HardwareError(f"{where} must be a finite number in SI units; got {value!r}.")
    return float(value)


def as_int(value: object, where: str) -> int:
    """A whole number; 80e9 counts, since TOML writers like exponents."""
    number = as_float(value, where)
    if not number.is_integer():
        raise HardwareError(f"{where} must be a whole number; got {value!r}.")
    return int(number)


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise HardwareError(f"{where} must be a text that is not empty; got {value!r}.")
    return value


def check_keys(
    record: Mapping[str, object],
    where: str,
    *,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> None:
    """Each required key is there and none is unknown: a misspelt one must not go unnoticed."""
    missing = [key for key in required if key not in record]
    if missing:
        raise HardwareError(
            f"{where} lacks {', '.join(missing)}; got {sorted(record)}. Add what is missing."
        )
    unknown = sorted(set(record) - set(required) - set(optional))
    if unknown:
        known = ", ".join(required + optional)
        raise HardwareError(
            f"{where} has unknown keys {', '.join(unknown)}. Remove them; known are {known}."
        )
