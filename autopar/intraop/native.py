"""The functions of sweep.c, compiled once per machine with its C compiler.

The library is kept in the cache folder under a hash of the source, the flags and the compiler's
version, and put there whole by renaming, so that several processes may make it at once. Where there
is no compiler, or it fails, numpy does the same: the same results, later.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from autopar.cache import cache_folder

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("sweep.c")
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
"""Neither -ffast-math nor -march: a sum is the same everywhere."""
_COMPILER_S = 60.0
"""A compiler that takes longer hangs."""


def address(array: NDArray[Any]) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


@cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be had."""
    try:
        return _declared(ctypes.CDLL(str(compiled_file(os.environ.get("CC", "cc")))))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.info("%s is not compiled, and numpy does it: %s", _SOURCE.name, error)
        return None


def compiled_file(compiler: str) -> Path:
    """The library's file. Raises OSError, SubprocessError."""
    version = _run(compiler, "--version")
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join((source, version, repr((_FLAGS, platform.machine())).encode())))
    file = cache_folder() / "compiled" / f"sweep-{key.hexdigest()[:32]}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            draft = Path(folder) / file.name
            _run(compiler, *_FLAGS, "-o", str(draft), str(_SOURCE), "-lm")
            os.replace(draft, file)
    return file


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_COMPILER_S).stdout


def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions: addresses are integers."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    program = [number, pointer, pointer, pointer]
    work = [pointer, number]
    for name, more, result in (
        ("forward", [*work, pointer], ctypes.c_double),
        ("backward", work, None),
        ("beliefs", [pointer], None),
        ("slack", [*work, pointer], None),
        ("cost", [pointer], ctypes.c_double),
    ):
        function = getattr(functions, name)
        function.argtypes, function.restype = [*program, *more], result
    functions.min_plus.argtypes = [number, number, number, pointer, pointer, pointer]
    functions.min_plus.restype = None
    return functions
