"""Where a result was measured: commit, versions, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "networkx", "ortools", "pulp", "transformers")


def commit() -> str:
    """Short hash, "-dirty" with changes beside it; outside a repository AUTOPAR_COMMIT, or
    "unknown"."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("AUTOPAR_COMMIT", "unknown")
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware() -> dict[str, object]:
    record: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name(0)
        record["gpus"] = torch.cuda.device_count()
    return record


def machine() -> str:
    """A short name for file names: "2xh100", "cpu2"."""
    if torch.cuda.is_available():
        words = torch.cuda.get_device_name(0).lower().split()
        kind = next((w for w in words if any(c.isdigit() for c in w)), words[-1])
        return f"{torch.cuda.device_count()}x{kind.replace('/', '-')}"
    return f"cpu{os.cpu_count() or 1}"


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
