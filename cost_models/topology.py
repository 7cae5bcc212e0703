"""The cluster: groups of equal nodes, the devices in them, the links inside and between nodes.

Text form: `DEVICE:NODESxDEVICES_PER_NODE`, groups joined by `+`, as in "h100:1x8" and
"h100:1x8+a100:2x8"; links are then the usual ones of each device. Full form: `to_dict`, which holds
every constant, so that a plan saved with it needs no catalogue to be read again.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cost_models.errors import ClusterError, HardwareError
from cost_models.hardware import Catalog, DeviceKind, Link, builtin_catalog
from cost_models.records import as_int, as_list, as_record, as_text, check_keys

Named = TypeVar("Named", DeviceKind, Link)

_GROUP_TEXT = re.compile(r"(?P<device>[^:\s]+):(?P<nodes>\d+)x(?P<devices>\d+)")
_TEXT_FORM = 'Write DEVICE:NODESxDEVICES_PER_NODE, as in "h100:2x8"; join groups with "+".'


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes of equal devices; `intra` joins the devices of a node."""

    num_nodes: int
    devices_per_node: int
    device: DeviceKind
    intra: Link

    def __post_init__(self) -> None:
        for key in ("num_nodes", "devices_per_node"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ClusterError(
                    f"{key} of the {self.device.name} nodes must be a whole number from 1; "
                    f"got {value!r}."
                )

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def __str__(self) -> str:
        return f"{self.device.name}:{self.num_nodes}x{self.devices_per_node}"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Node groups in the order of their nodes, and the link between any two nodes.

    Neighbours that differ in nothing but their number of nodes become one group. Devices are
    numbered group by group, node by node: their ranks.
    """

    groups: tuple[NodeGroup, ...]
    inter: Link

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", _merged(self.groups))
        if not self.groups:
            raise ClusterError("a cluster needs at least one group of nodes; got none.")
        _by_name([group.device for group in self.groups], "devices")
        _by_name([*(group.intra for group in self.groups), self.inter], "links")

    @property
    def num_nodes(self) -> int:
        return sum(group.num_nodes for group in self.groups)

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    def ranks(self, group: int) -> range:
        """The ranks of a group's devices."""
        start = sum(before.num_devices for before in self.groups[:group])
        return range(start, start + self.groups[group].num_devices)

    @property
    def devices(self) -> Mapping[str, DeviceKind]:
        """The device kinds of the cluster by name."""
        return _by_name([group.device for group in self.groups], "devices")

    @property
    def links(self) -> Mapping[str, Link]:
        """The links of the cluster by name."""
        return _by_name([*(group.intra for group in self.groups), self.inter], "links")

    def __str__(self) -> str:
        return "+".join(str(group) for group in self.groups)

    @classmethod
    def uniform(
        cls,
        *,
        num_nodes: int,
        devices_per_node: int,
        device: DeviceKind | str,
        intra: Link | str | None = None,
        inter: Link | str | None = None,
    ) -> "Cluster":
        """Equal nodes. A name is looked up; a link left out is the usual one of the device."""
        catalog = builtin_catalog()
        kind = catalog.device(device) if isinstance(device, str) else device
        group = NodeGroup(num_nodes, devices_per_node, kind, _intra(intra, kind, catalog))
        return cls((group,), _inter(inter, (group,), catalog))

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """Read a text such as "h100:2x8"; ClusterError or UnknownHardwareError otherwise."""
        catalog = builtin_catalog()
        groups = tuple(_parse_group(part.strip(), text, catalog) for part in text.split("+"))
        return cls(groups, _inter(None, groups, catalog))

    @classmethod
    def from_toml(cls, path: str | Path) -> "Cluster":
        """Read a TOML file. All is in SI units; own devices and links come before known ones.

        ```toml
        inter = "ib-400g"                # between nodes; may be left out for known devices
        [[groups]]                       # one table a group of equal nodes
        num_nodes = 2
        devices_per_node = 8
        device = "mychip"                # a known name, or one defined below
        intra = "mylink"                 # inside a node; may be left out for a known device
        [devices.mychip]                 # every constant of DeviceKind
        peak_flops = { float32 = 1e13, bfloat16 = 1e14 }
        vector_flops = 1e13
        memory_bytes = 32e9
        memory_bandwidth_bytes_per_s = 1e12
        launch_s = 5e-6
        matmul_efficiency = 0.8
        memory_efficiency = 0.9
        matmul_half_flops = 2e9
        source = "mychip datasheet; efficiencies measured"
        [links.mylink]                   # every constant of Link
        latency_s = 2e-6
        bandwidth_bytes_per_s = 1e11     # a device, one direction, while all devices use theirs
        efficiency = 0.8
        launch_s = 20e-6
        source = "mylink datasheet; launch_s measured"
        ```
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ClusterError(
                f"cannot read the cluster file {path}: {error}. Cluster.from_toml shows the format."
            ) from error
        except HardwareError as error:
            raise ClusterError(
                f"in the cluster file {path}: {error} Cluster.from_toml shows the format."
            ) from error

    def to_dict(self) -> dict[str, object]:
        """The record that `from_dict` reads, complete, in the TOML file's format."""
        return {
            "groups": [
                {
                    "num_nodes": group.num_nodes,
                    "devices_per_node": group.devices_per_node,
                    "device": group.device.name,
                    "intra": group.intra.name,
                }
                for group in self.groups
            ],
            "inter": self.inter.name,
            "devices": {name: kind.to_dict() for name, kind in self.devices.items()},
            "links": {name: link.to_dict() for name, link in self.links.items()},
        }

    @classmethod
    def from_dict(cls, record: object) -> "Cluster":
        values = as_record(record, "cluster")
        check_keys(values, "cluster", required=("groups",), optional=("inter", "devices", "links"))
        own = Catalog.from_dict(
            {key: values[key] for key in ("devices", "links") if key in values}, "cluster"
        )
        catalog = builtin_catalog().extended(own.devices, own.links)
        groups = tuple(
            _read_group(group, f"groups[{index}]", catalog)
            for index, group in enumerate(as_list(values["groups"], "groups"))
        )
        inter = as_text(values["inter"], "inter") if "inter" in values else None
        return cls(groups, _inter(inter, groups, catalog))


def _merged(groups: Iterable[NodeGroup]) -> tuple[NodeGroup, ...]:
    """Equal neighbours as one group."""
    merged: list[NodeGroup] = []
    for group in groups:
        if merged and replace(merged[-1], num_nodes=group.num_nodes) == group:
            group = replace(group, num_nodes=merged.pop().num_nodes + group.num_nodes)
        merged.append(group)
    return tuple(merged)


def _parse_group(part: str, text: str, catalog: Catalog) -> NodeGroup:
    match = _GROUP_TEXT.fullmatch(part)
    if match is None:
        raise ClusterError(f"cannot read {part!r} of the cluster {text!r}. {_TEXT_FORM}")
    kind = catalog.device(match["device"])
    return NodeGroup(int(match["nodes"]), int(match["devices"]), kind, _intra(None, kind, catalog))


def _read_group(record: object, where: str, catalog: Catalog) -> NodeGroup:
    values = as_record(record, where)
    check_keys(
        values, where, required=("num_nodes", "devices_per_node", "device"), optional=("intra",)
    )
    kind = catalog.device(as_text(values["device"], f"{where}: device"))
    intra = as_text(values["intra"], f"{where}: intra") if "intra" in values else None
    return NodeGroup(
        as_int(values["num_nodes"], f"{where}: num_nodes"),
        as_int(values["devices_per_node"], f"{where}: devices_per_node"),
        kind,
        _intra(intra, kind, catalog),
    )


def _intra(given: Link | str | None, kind: DeviceKind, catalog: Catalog) -> Link:
    if isinstance(given, Link):
        return given
    return catalog.link(given or _default_links(kind, "intra", catalog)[0])


def _inter(given: Link | str | None, groups: tuple[NodeGroup, ...], catalog: Catalog) -> Link:
    """The given link, or the slowest of those usual for the groups' devices."""
    if isinstance(given, Link):
        return given
    if given is not None:
        return catalog.link(given)
    usual = [catalog.link(_default_links(g.device, "inter", catalog)[1]) for g in groups]
    if not usual:
        raise ClusterError("a cluster needs at least one group of nodes; got none.")
    return min(usual, key=lambda link: link.achieved_bytes_per_s)


def _default_links(kind: DeviceKind, missing: str, catalog: Catalog) -> tuple[str, str]:
    if kind.name not in catalog.default_links:
        raise ClusterError(
            f"device {kind.name!r} has no usual {missing} link. Name one as `{missing}`: "
            f"{', '.join(catalog.links)}, or one that the cluster file defines under [links.NAME]."
        )
    return catalog.default_links[kind.name]


def _by_name(items: Sequence[Named], what: str) -> dict[str, Named]:
    """Items by name; two different ones under one name would be lost in the cluster's record."""
    named: dict[str, Named] = {}
    for item in items:
        if named.setdefault(item.name, item) != item:
            raise ClusterError(
                f"two different {what} of the cluster are called {item.name!r}. Rename one of them."
            )
    return named
