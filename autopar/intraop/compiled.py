"""The passes of `sweep` in C, compiled once per machine with its C compiler.

The library is kept in the cache folder under a hash of the source, the flags and the compiler's
version, and put there whole by renaming, so that several processes may make it at once. Where there
is no compiler, or it fails, the numpy passes run: the same results, later.
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

import numpy as np
from numpy.typing import NDArray

from autopar.cache import cache_folder
from autopar.intraop.problem import FloatArray, IntArray
from autopar.intraop.reduce import Graph
from autopar.intraop.sweep import Arcs, TreeReweighted, WarmMessages

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("sweep.c")
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
"""Neither -ffast-math nor -march: a sum is the same everywhere."""
_COMPILER_S = 60.0
"""A compiler that takes longer hangs."""


def tree_reweighted(
    graph: Graph, forbidden_seconds: float = 0.0, warm: WarmMessages | None = None
) -> TreeReweighted:
    """Its messages, with passes in C where they can be had."""
    passes = library()
    if passes is None:
        return TreeReweighted(graph, forbidden_seconds, warm)
    return CompiledTreeReweighted(passes, graph, forbidden_seconds, warm)


class CompiledTreeReweighted(TreeReweighted):
    """The same on the same arrays, which C sees by their addresses."""

    def __init__(
        self,
        passes: ctypes.CDLL,
        graph: Graph,
        forbidden_seconds: float = 0.0,
        warm: WarmMessages | None = None,
    ) -> None:
        super().__init__(graph, forbidden_seconds, warm)
        self._passes = passes
        self._work = np.empty((2, self.sizes.max(initial=1)))
        self._nodes = np.stack(
            (
                self.first[:-1],
                self.sizes,
                self.first_later[:-1],
                np.diff(self.first_later),
                self.first_earlier[:-1] + len(self.later.here),
                np.diff(self.first_earlier),
            ),
            axis=1,
        )
        tables = (_table(self.later, self.messages), _table(self.earlier, self.messages))
        self._arcs = np.concatenate(tables)

    def forward(self) -> tuple[float, IntArray]:
        position = np.zeros(len(self.nodes), dtype=np.int64)
        bound = self._passes.forward(*self._program(), *self._room(), _address(position))
        return bound, position

    def backward(self) -> None:
        self._passes.backward(*self._program(), *self._room())

    def beliefs(self) -> FloatArray:
        out = np.empty_like(self.unary)
        self._passes.beliefs(*self._program(), _address(out))
        return out

    def slack(self) -> FloatArray:
        out = np.empty_like(self.unary)
        self._passes.slack(*self._program(), *self._room(), _address(out))
        return out

    def cost(self, position: IntArray) -> float:
        return float(self._passes.cost(*self._program(), _address(position)))

    def _program(self) -> tuple[int, ...]:
        arrays = self._nodes, self._arcs, self.unary
        return (len(self.nodes), *map(_address, arrays))

    def _room(self) -> tuple[int, int]:
        return _address(self._work), self._work.shape[1]


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _table(arcs: Arcs, messages: FloatArray) -> NDArray[np.int64]:
    """sweep.c's Arc of every arc."""
    known: dict[int, int] = {}  # addresses by identity: most arcs share their matrices

    def addresses(matrices: list[FloatArray]) -> list[int]:
        for matrix in matrices:
            if id(matrix) not in known:
                assert matrix.flags.c_contiguous
                known[id(matrix)] = _address(matrix)
        return [known[id(matrix)] for matrix in matrices]

    first, width = _address(messages), messages.itemsize
    return np.stack(
        (
            arcs.there,
            first + width * arcs.message,
            first + width * arcs.reply,
            np.array(addresses(arcs.matrix), dtype=np.int64),
            np.array(addresses(arcs.back), dtype=np.int64),
            np.array(addresses(arcs.exact), dtype=np.int64),
        ),
        axis=1,
    )


@cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be had."""
    try:
        return _declared(ctypes.CDLL(str(compiled_file(os.environ.get("CC", "cc")))))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.info("%s is not compiled, and its passes run in numpy: %s", _SOURCE.name, error)
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


def _declared(passes: ctypes.CDLL) -> ctypes.CDLL:
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
        function = getattr(passes, name)
        function.argtypes, function.restype = [*program, *more], result
    return passes
