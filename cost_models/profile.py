"""A profile: constants of one device kind and its links, and the measurements that they fit.

Versioned JSON. `Profile.apply_to` puts the constants into a cluster; the profiles of the package
lie in `profiles/`, one file a device kind (`Profile.builtin`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from importlib import resources
from pathlib import Path

from cost_models.errors import CostModelError, ProfileError
from cost_models.hardware import DeviceKind, Link
from cost_models.measurements import CollectiveMeasurement, MatmulMeasurement
from cost_models.records import FrozenMap, as_list, as_record, as_text, check_keys
from cost_models.topology import Cluster

PROFILE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where and when was measured. `measured_on` is ISO 8601; None: it was not recorded."""

    machine: str
    versions: Mapping[str, str]
    measured_on: str | None
    commit: str | None
    notes: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", FrozenMap(self.versions))
        if self.measured_on is not None:
            try:
                date.fromisoformat(self.measured_on)
            except ValueError as error:
                raise ProfileError(
                    f"provenance: measured_on must be a date such as 2026-01-31, or null; "
                    f"got {self.measured_on!r}."
                ) from error

    def to_dict(self) -> dict[str, object]:
        return {
            "machine": self.machine,
            "versions": dict(self.versions),
            "measured_on": self.measured_on,
            "commit": self.commit,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, record: object) -> "Provenance":
        values = as_record(record, "provenance")
        keys = ("machine", "versions", "measured_on", "commit")
        check_keys(values, "provenance", required=keys, optional=("notes",))
        versions = as_record(values["versions"], "provenance: versions")
        notes = values.get("notes", "")
        return cls(
            machine=as_text(values["machine"], "provenance: machine"),
            versions={
                key: as_text(value, f"provenance: versions.{key}")
                for key, value in versions.items()
            },
            measured_on=_optional_text(values["measured_on"], "provenance: measured_on"),
            commit=_optional_text(values["commit"], "provenance: commit"),
            notes=as_text(notes, "provenance: notes") if notes != "" else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The constants of one device kind and of its links, and what they rest on."""

    device: DeviceKind
    links: Mapping[str, Link]
    provenance: Provenance
    matmuls: tuple[MatmulMeasurement, ...] = ()
    collectives: tuple[CollectiveMeasurement, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "links", FrozenMap(self.links))
        for matmul in self.matmuls:
            if matmul.dtype not in self.device.peak_flops:
                raise ProfileError(
                    f"{matmul}: device {self.device.name!r} of the profile has no rate for "
                    f"{matmul.dtype!r}. Add it to peak_flops."
                )
        for collective in self.collectives:
            if collective.link not in self.links:
                raise ProfileError(
                    f"{collective}: the profile has no link {collective.link!r}, only "
                    f"{', '.join(self.links) or 'none'}. Add it to links."
                )

    def errors(self) -> dict[str, float]:
        """The signed relative error of the cost model at each measurement, by its text."""
        matmuls = {
            str(m): m.seconds.relative_error(m.predicted_s(self.device)) for m in self.matmuls
        }
        collectives = {
            str(c): c.seconds.relative_error(c.predicted_s(self.links)) for c in self.collectives
        }
        return {**matmuls, **collectives}

    def apply_to(self, cluster: Cluster) -> Cluster:
        """The cluster with this profile's constants for its device and links of the same names."""
        if self.device.name not in cluster.devices:
            raise ProfileError(
                f"the profile is of device {self.device.name!r}; the cluster {cluster} has "
                f"{', '.join(cluster.devices)}. Use a profile of one of these."
            )
        groups = tuple(
            replace(
                group,
                device=self.device if group.device.name == self.device.name else group.device,
                intra=self.links.get(group.intra.name, group.intra),
            )
            for group in cluster.groups
        )
        return Cluster(groups, self.links.get(cluster.inter.name, cluster.inter))

    def to_dict(self) -> dict[str, object]:
        return {
            "version": PROFILE_VERSION,
            "device": {"name": self.device.name, **self.device.to_dict()},
            "links": {name: link.to_dict() for name, link in self.links.items()},
            "provenance": self.provenance.to_dict(),
            "matmuls": [matmul.to_dict() for matmul in self.matmuls],
            "collectives": [collective.to_dict() for collective in self.collectives],
        }

    @classmethod
    def from_dict(cls, record: object) -> "Profile":
        values = as_record(record, "profile")
        if values.get("version") != PROFILE_VERSION:
            raise ProfileError(
                f"profile version must be {PROFILE_VERSION}; got {values.get('version')!r}. "
                "Calibrate again, or use the release that wrote the file."
            )
        keys = ("version", "device", "links", "provenance", "matmuls", "collectives")
        check_keys(values, "profile", required=keys)
        device = dict(as_record(values["device"], "device"))
        name = as_text(device.pop("name", None), "device: name")
        links = as_record(values["links"], "links")
        return cls(
            device=DeviceKind.from_dict(name, device),
            links={name: Link.from_dict(name, link) for name, link in links.items()},
            provenance=Provenance.from_dict(values["provenance"]),
            matmuls=tuple(
                MatmulMeasurement.from_dict(matmul, f"matmuls[{index}]")
                for index, matmul in enumerate(as_list(values["matmuls"], "matmuls"))
            ),
            collectives=tuple(
                CollectiveMeasurement.from_dict(collective, f"collectives[{index}]")
                for index, collective in enumerate(as_list(values["collectives"], "collectives"))
            ),
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """The profile of a JSON file; ProfileError where there is none or it breaks the schema."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"cannot read the profile {path}: {error}.") from error
        return cls._from_json(text, str(path))

    @classmethod
    def builtin(cls, device_name: str) -> "Profile":
        """The profile that the package holds for this device kind."""
        folder = resources.files("cost_models").joinpath("profiles")
        known = sorted(
            entry.name.removesuffix(".json")
            for entry in folder.iterdir()
            if entry.name.endswith(".json")
        )
        if device_name not in known:
            raise ProfileError(
                f"no profile of device {device_name!r} comes with the package; there are "
                f"{', '.join(known)}. Measure on the device, then use Profile.load(path)."
            )
        file = folder.joinpath(f"{device_name}.json")
        return cls._from_json(file.read_text(encoding="utf-8"), file.name)

    @classmethod
    def _from_json(cls, text: str, where: str) -> "Profile":
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ProfileError(f"the profile {where} is not JSON: {error}.") from error
        except CostModelError as error:
            raise ProfileError(f"in the profile {where}: {error}") from error


def _optional_text(value: object, where: str) -> str | None:
    return None if value is None else as_text(value, where)
