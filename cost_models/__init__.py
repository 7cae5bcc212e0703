"""Hardware facts into seconds: devices, links, clusters, the cost of compute and of collectives.

Knows hardware and never programs; imports neither autopar nor torch. Units are SI everywhere.
"""

from cost_models.collectives import (
    AffineCost,
    CollectiveKind,
    LinkPath,
    collective_coefficients,
    collective_s,
)
from cost_models.compute import matmul_s, pointwise_s
from cost_models.errors import (
    ClusterError,
    CostModelError,
    HardwareError,
    ProfileError,
    UnknownHardwareError,
)
from cost_models.hardware import DTYPE_BYTES, DeviceKind, Link, device, link
from cost_models.measurements import CollectiveMeasurement, MatmulMeasurement, SecondsRange
from cost_models.profile import Profile, Provenance
from cost_models.topology import Cluster, NodeGroup

__all__ = [
    "DTYPE_BYTES",
    "AffineCost",
    "Cluster",
    "ClusterError",
    "CollectiveKind",
    "CollectiveMeasurement",
    "CostModelError",
    "DeviceKind",
    "HardwareError",
    "Link",
    "LinkPath",
    "MatmulMeasurement",
    "NodeGroup",
    "Profile",
    "ProfileError",
    "Provenance",
    "SecondsRange",
    "UnknownHardwareError",
    "collective_coefficients",
    "collective_s",
    "device",
    "link",
    "matmul_s",
    "pointwise_s",
]
