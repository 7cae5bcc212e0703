"""What the package exports, and what it must not import."""

import subprocess
import sys
from pathlib import Path

import cost_models

PUBLIC_NAMES = [
    "AffineCost",
    "Cluster",
    "ClusterError",
    "CollectiveKind",
    "CollectiveMeasurement",
    "CostModelError",
    "DTYPE_BYTES",
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


def test_public_names() -> None:
    assert sorted(cost_models.__all__) == PUBLIC_NAMES
    assert all(hasattr(cost_models, name) for name in PUBLIC_NAMES)


def test_imports_neither_torch_nor_autopar() -> None:
    code = (
        "import sys, cost_models; cost_models.device('h100'); "
        "print(sorted({'torch', 'autopar'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(cost_models.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
