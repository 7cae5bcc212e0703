"""Devices and links as numbers, and the catalogue of the known ones.

A `DeviceKind` holds what `compute` needs, a `Link` what `collectives` needs; both are SI units
only: seconds, bytes, bytes per second, FLOP, FLOP per second (a multiply-add counts 2). The known
ones are read from `catalog.toml` beside this file, in the very format in which a user adds one to a
cluster file (`Cluster.from_toml`). An unknown name is an error: no device ever borrows another
one's numbers.
"""

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources

from cost_models.errors import HardwareError, UnknownHardwareError
from cost_models.records import FrozenMap, as_float, as_int, as_record, as_text, check_keys

# Bytes of one element. tfloat32 is how a matmul multiplies float32 values: stored as these.
DTYPE_BYTES: Mapping[str, int] = FrozenMap(
    {"float64": 8, "float32": 4, "tfloat32": 4, "bfloat16": 2, "float16": 2}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """One kind of accelerator (or CPU process).

    peak_flops                     dense matmul FLOP/s of the datasheet, by dtype of the operands
    vector_flops                   FLOP/s of pointwise work
    memory_bytes                   what one process can allocate
    memory_bandwidth_bytes_per_s   of the datasheet
    launch_s                       fixed seconds of one operator
    matmul_efficiency              fraction of `peak_flops` that a large matmul reaches: its plateau
    memory_efficiency              fraction of the bandwidth that a streaming kernel reaches
    matmul_half_flops              FLOP of the matmul at half the plateau, at the fastest dtype
    source                         where each number comes from
    host_bandwidth_bytes_per_s     between device and host, one direction, all devices of a node at
                                   work, as pinned memory reaches it; None where nothing can be
                                   offloaded
    host_optimizer_bytes_per_s     what the device's share of the host reads and writes per second
                                   in an optimizer's step; given with the bandwidth or not at all
    """

    name: str
    peak_flops: Mapping[str, float]
    vector_flops: float
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    launch_s: float
    matmul_efficiency: float
    memory_efficiency: float
    matmul_half_flops: float
    source: str
    host_bandwidth_bytes_per_s: float | None = None
    host_optimizer_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        where = f"device {self.name!r}"
        _check_name(self.name, where)
        if not self.peak_flops:
            raise HardwareError(
                f"{where}: peak_flops is empty. Give FLOP/s for at least one dtype."
            )
        for dtype, flops in self.peak_flops.items():
            if dtype not in DTYPE_BYTES:
                raise HardwareError(
                    f"{where}: peak_flops names an unknown data type {dtype!r}; "
                    f"the known ones are {', '.join(DTYPE_BYTES)}."
                )
            _check_positive(flops, f"{where}: peak_flops[{dtype!r}]")
        object.__setattr__(self, "peak_flops", FrozenMap(self.peak_flops))
        for key in ("vector_flops", "memory_bytes", "memory_bandwidth_bytes_per_s"):
            _check_positive(getattr(self, key), f"{where}: {key}")
        for key in ("launch_s", "matmul_half_flops"):
            _check_not_negative(getattr(self, key), f"{where}: {key}")
        for key in ("matmul_efficiency", "memory_efficiency"):
            _check_fraction(getattr(self, key), f"{where}: {key}")
        as_text(self.source, f"{where}: source")
        given = [key for key in _HOST_KEYS if getattr(self, key) is not None]
        for key in given:
            _check_positive(getattr(self, key), f"{where}: {key}")
        if len(given) == 1:
            raise HardwareError(
                f"{where}: {given[0]} is given alone. Give both of {', '.join(_HOST_KEYS)}, or "
                "neither where nothing can be offloaded."
            )

    @property
    def can_offload(self) -> bool:
        """Whether it is known what keeping parameters on the host costs."""
        return self.host_bandwidth_bytes_per_s is not None

    def peak(self, dtype: str) -> float:
        """Dense matmul FLOP/s of the datasheet; UnknownHardwareError where it has no such dtype."""
        if dtype not in self.peak_flops:
            raise UnknownHardwareError(
                f"device {self.name!r} has no matmul rate for data type {dtype!r}; "
                f"it has {', '.join(self.peak_flops)}. Choose one of these, or define the device "
                f"with that rate under [devices.{self.name}] of a cluster TOML file, loaded with "
                "Cluster.from_toml(path)."
            )
        return self.peak_flops[dtype]

    def to_dict(self) -> dict[str, object]:
        """Every constant but the name, under which the caller files it."""
        record = {key: getattr(self, key) for key in (*_DEVICE_KEYS, *_HOST_KEYS)}
        known = {key: value for key, value in record.items() if value is not None}
        return {**known, "peak_flops": dict(self.peak_flops)}

    @classmethod
    def from_dict(cls, name: str, record: object) -> "DeviceKind":
        where = f"device {name!r}"
        values = as_record(record, where)
        check_keys(values, where, required=_DEVICE_KEYS, optional=_HOST_KEYS)
        peaks = as_record(values["peak_flops"], f"{where}: peak_flops")
        return cls(
            name=name,
            peak_flops={
                dtype: as_float(flops, f"{where}: peak_flops[{dtype!r}]")
                for dtype, flops in peaks.items()
            },
            memory_bytes=as_int(values["memory_bytes"], f"{where}: memory_bytes"),
            source=as_text(values["source"], f"{where}: source"),
            **{key: as_float(values[key], f"{where}: {key}") for key in _DEVICE_FLOATS},
            **{
                key: as_float(values[key], f"{where}: {key}") for key in _HOST_KEYS if key in values
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins devices, as one device sees it in one direction while all its peers use theirs.

    latency_s               seconds of one hop from a device to the next
    bandwidth_bytes_per_s   nominal; a network card shared by the node's devices counts its share
    efficiency              fraction of the bandwidth that a large collective reaches
    launch_s                fixed seconds of one collective, whatever its size and ranks
    source                  where each number comes from
    """

    name: str
    latency_s: float
    bandwidth_bytes_per_s: float
    efficiency: float
    launch_s: float
    source: str

    def __post_init__(self) -> None:
        where = f"link {self.name!r}"
        _check_name(self.name, where)
        _check_positive(self.bandwidth_bytes_per_s, f"{where}: bandwidth_bytes_per_s")
        _check_fraction(self.efficiency, f"{where}: efficiency")
        for key in ("latency_s", "launch_s"):
            _check_not_negative(getattr(self, key), f"{where}: {key}")
        as_text(self.source, f"{where}: source")

    @property
    def achieved_bytes_per_s(self) -> float:
        return self.bandwidth_bytes_per_s * self.efficiency

    def shared_by(self, num_flows: int) -> "Link":
        """What one of `num_flows` simultaneous users of this link gets: contention."""
        if num_flows < 1:
            raise HardwareError(
                f"link {self.name!r}: num_flows must be at least 1; got {num_flows}."
            )
        return replace(self, bandwidth_bytes_per_s=self.bandwidth_bytes_per_s / num_flows)

    def to_dict(self) -> dict[str, object]:
        """Every constant but the name, under which the caller files it."""
        return {key: getattr(self, key) for key in _LINK_KEYS}

    @classmethod
    def from_dict(cls, name: str, record: object) -> "Link":
        where = f"link {name!r}"
        values = as_record(record, where)
        check_keys(values, where, required=_LINK_KEYS)
        return cls(
            name=name,
            source=as_text(values["source"], f"{where}: source"),
            **{key: as_float(values[key], f"{where}: {key}") for key in _LINK_FLOATS},
        )


_HOST_KEYS = ("host_bandwidth_bytes_per_s", "host_optimizer_bytes_per_s")  # both are optional
_DEVICE_KEYS = tuple(
    field.name for field in fields(DeviceKind) if field.name not in ("name", *_HOST_KEYS)
)
_DEVICE_FLOATS = tuple(
    key for key in _DEVICE_KEYS if key not in ("peak_flops", "memory_bytes", "source")
)
_LINK_KEYS = tuple(field.name for field in fields(Link) if field.name != "name")
_LINK_FLOATS = tuple(key for key in _LINK_KEYS if key != "source")


@dataclass(frozen=True, slots=True)
class Catalog:
    """Named devices and links; `default_links[device]` are its usual (intra, inter) link names."""

    devices: Mapping[str, DeviceKind]
    links: Mapping[str, Link]
    default_links: Mapping[str, tuple[str, str]]

    def device(self, name: str) -> DeviceKind:
        if name not in self.devices:
            raise _unknown("device", name, self.devices)
        return self.devices[name]

    def link(self, name: str) -> Link:
        if name not in self.links:
            raise _unknown("link", name, self.links)
        return self.links[name]

    def extended(self, devices: Mapping[str, DeviceKind], links: Mapping[str, Link]) -> "Catalog":
        """This catalogue plus more entries; one of the same name takes the place of the old one."""
        return Catalog(
            FrozenMap({**self.devices, **devices}),
            FrozenMap({**self.links, **links}),
            self.default_links,
        )

    @classmethod
    def from_dict(cls, record: object, where: str) -> "Catalog":
        """Tables `devices`, `links`, `default_links`, each optional, as in catalog.toml."""
        values = as_record(record, where)
        check_keys(values, where, required=(), optional=("devices", "links", "default_links"))
        tables = {
            key: as_record(values.get(key, {}), f"{where}: {key}")
            for key in ("devices", "links", "default_links")
        }
        defaults: dict[str, tuple[str, str]] = {}
        for name, pair in tables["default_links"].items():
            pair_where = f"{where}: default_links.{name}"
            names = as_record(pair, pair_where)
            check_keys(names, pair_where, required=("intra", "inter"))
            defaults[name] = (
                as_text(names["intra"], f"{pair_where}.intra"),
                as_text(names["inter"], f"{pair_where}.inter"),
            )
        return cls(
            FrozenMap({n: DeviceKind.from_dict(n, r) for n, r in tables["devices"].items()}),
            FrozenMap({n: Link.from_dict(n, r) for n, r in tables["links"].items()}),
            FrozenMap(defaults),
        )


@functools.cache
def builtin_catalog() -> Catalog:
    """The devices and links of `catalog.toml`; read once, immutable."""
    text = resources.files("cost_models").joinpath("catalog.toml").read_text(encoding="utf-8")
    return Catalog.from_dict(tomllib.loads(text), "catalog.toml")


def device(name: str) -> DeviceKind:
    """The known device of this name; UnknownHardwareError otherwise."""
    return builtin_catalog().device(name)


def link(name: str) -> Link:
    """The known link of this name; UnknownHardwareError otherwise."""
    return builtin_catalog().link(name)


def _unknown(what: str, name: str, known: Mapping[str, object]) -> UnknownHardwareError:
    by_lower_case = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    guess = f" Did you mean {by_lower_case[close[0]]!r}?" if close else ""
    return UnknownHardwareError(
        f"unknown {what} {name!r}.{guess} The known ones are {', '.join(known)}. To add one, put "
        f"its constants under [{what}s.{name}] of a cluster TOML file and load it with "
        "Cluster.from_toml(path)."
    )


def _check_name(name: str, where: str) -> None:
    if not name or any(character.isspace() or character in ":+" for character in name):
        raise HardwareError(f"{where}: a name is not empty and has no space, colon or plus sign.")


def _check_positive(value: float, where: str) -> None:
    if as_float(value, where) <= 0:
        raise HardwareError(f"{where} must be above 0; got {value!r}.")


def _check_not_negative(value: float, where: str) -> None:
    if as_float(value, where) < 0:
        raise HardwareError(f"{where} must be 0 or more; got {value!r}.")


def _check_fraction(value: float, where: str) -> None:
    if not 0 < as_float(value, where) <= 1:
        raise HardwareError(f"{where} is a fraction, above 0 and at most 1; got {value!r}.")
