"""Measured seconds of operators and collectives, and how far the cost model is from them.

A measurement is a range, as repeated runs give one; a prediction's error is its relative distance
to the nearer end, 0 inside the range. Records are JSON: {"m", "k", "n", "dtype", "min_s", "max_s"}
for a matmul,
{"kind", "size_bytes", "num_ranks", "link", "min_s", "max_s"} for a collective.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.collectives import CollectiveKind, collective_s
from cost_models.compute import matmul_s
from cost_models.errors import ProfileError
from cost_models.hardware import DTYPE_BYTES, DeviceKind, Link
from cost_models.records import as_float, as_int, as_record, as_text, check_keys


@dataclass(frozen=True, slots=True)
class SecondsRange:
    """Measured seconds, lowest and highest."""

    min_s: float
    max_s: float

    def __post_init__(self) -> None:
        if not 0 < self.min_s <= self.max_s:
            raise ProfileError(
                f"measured seconds are above 0, min_s first; got {self.min_s} to {self.max_s}."
            )

    def relative_error(self, predicted_s: float) -> float:
        """Signed: below 0 where the prediction is too fast."""
        nearest_s = min(max(predicted_s, self.min_s), self.max_s)
        return (predicted_s - nearest_s) / nearest_s


@dataclass(frozen=True, slots=True)
class MatmulMeasurement:
    """[m, k] @ [k, n], each operand read once and the result written once."""

    m: int
    k: int
    n: int
    dtype: str
    seconds: SecondsRange

    def __post_init__(self) -> None:
        if min(self.m, self.k, self.n) < 1 or self.dtype not in DTYPE_BYTES:
            raise ProfileError(
                f"a matmul measurement needs sizes from 1 and a data type of "
                f"{', '.join(DTYPE_BYTES)}; got {self}."
            )

    def __str__(self) -> str:
        return f"matmul {self.dtype} {self.m}x{self.k}x{self.n}"

    def predicted_s(self, device: DeviceKind) -> float:
        elements = self.m * self.k + self.k * self.n + self.m * self.n
        flops = 2 * self.m * self.k * self.n
        return matmul_s(flops, elements * DTYPE_BYTES[self.dtype], self.dtype, device)

    def to_dict(self) -> dict[str, object]:
        return {
            "m": self.m,
            "k": self.k,
            "n": self.n,
            "dtype": self.dtype,
            "min_s": self.seconds.min_s,
            "max_s": self.seconds.max_s,
        }

    @classmethod
    def from_dict(cls, record: object, where: str) -> "MatmulMeasurement":
        values = as_record(record, where)
        check_keys(values, where, required=("m", "k", "n", "dtype", "min_s", "max_s"))
        m, k, n = (as_int(values[key], f"{where}: {key}") for key in ("m", "k", "n"))
        return cls(m, k, n, as_text(values["dtype"], f"{where}: dtype"), _seconds(values, where))


@dataclass(frozen=True, slots=True)
class CollectiveMeasurement:
    """One collective; bytes as `collectives` counts them, 0 for the limit of small messages."""

    kind: CollectiveKind
    size_bytes: int
    num_ranks: int
    link: str
    seconds: SecondsRange

    def __str__(self) -> str:
        return f"{self.kind} {self.size_bytes} bytes, {self.num_ranks} ranks, {self.link}"

    def predicted_s(self, links: Mapping[str, Link]) -> float:
        return collective_s(self.kind, self.size_bytes, self.num_ranks, links[self.link])

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind.value,
            "size_bytes": self.size_bytes,
            "num_ranks": self.num_ranks,
            "link": self.link,
            "min_s": self.seconds.min_s,
            "max_s": self.seconds.max_s,
        }

    @classmethod
    def from_dict(cls, record: object, where: str) -> "CollectiveMeasurement":
        values = as_record(record, where)
        check_keys(
            values,
            where,
            required=("kind", "size_bytes", "num_ranks", "link", "min_s", "max_s"),
        )
        kinds = [kind.value for kind in CollectiveKind]
        if values["kind"] not in kinds:
            raise ProfileError(
                f"{where}: kind must be one of {', '.join(kinds)}; got {values['kind']!r}."
            )
        return cls(
            CollectiveKind(values["kind"]),
            as_int(values["size_bytes"], f"{where}: size_bytes"),
            as_int(values["num_ranks"], f"{where}: num_ranks"),
            as_text(values["link"], f"{where}: link"),
            _seconds(values, where),
        )


def _seconds(values: Mapping[str, object], where: str) -> SecondsRange:
    return SecondsRange(
        as_float(values["min_s"], f"{where}: min_s"), as_float(values["max_s"], f"{where}: max_s")
    )
