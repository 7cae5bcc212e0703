"""Which kernel is the fastest for a product, found by running them here.

    round 1    each kernel of cuBLASLt's list, `_FIRST_S` long
    then       `_ROUNDS` times those within `_NEAR` of the best and the first of the list, in turn,
               `_LATER_S` long

Of the medians the least wins, if it beats the first of the list by `_GAIN`. A GPU that multiplies
all the time reaches its limit of power within milliseconds: what is timed is what a step will see.
Choices are agreed on by the ranks of a job, and kept in the cache by GPU and version of cuBLASLt.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from autopar.cache import read_record, write_record
from autopar.ops import cublaslt
from autopar.ops.cublaslt import Epilogue, Problem
from autopar.runtime.comm import World

_LOG = logging.getLogger(__name__)

_LEAST_FLOPS = 1 << 37  # 0.2 ms of an H100; a call takes 40 us of the host
_FIRST_S, _LATER_S = 0.03, 0.06
_ROUNDS = 3
_NEAR = 1.04
_GAIN = 1.02  # medians of one kernel differ by 1 % between two searches
_UNKNOWN = -1
_KIND = "kernels"  # of records in the cache


class FastestKernels:
    """Answers `compile.choices.Choose`."""

    def __init__(self, world: World | None) -> None:
        self._world = world

    def __call__(self, problem: Problem) -> int:
        kernels = range(cublaslt.num_kernels(problem))
        if problem.flops < _LEAST_FLOPS or len(kernels) < 2:
            return 0
        key = _key(problem)
        kept = read_record(_KIND, key)

        def find() -> int:
            return int(kept) if kept is not None and kept in kernels else _fastest(problem)

        found = find() if self._world is None else self._world.agree(f"kernel/{key}", find)
        if found not in kernels:
            return 0
        if found != kept:
            write_record(_KIND, key, found)
        return found


def _key(problem: Problem) -> str:
    """Of the problem on GPUs of its kind."""
    gpu = torch.cuda.get_device_name(problem.device)
    text = f"{gpu}, {cublaslt.version()}, {replace(problem, device=0)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _fastest(problem: Problem) -> int:
    """_UNKNOWN where there is no memory to try."""
    started = time.monotonic()
    try:
        with torch.cuda.device(problem.device):
            times = _times(_Call(problem))
    except torch.cuda.OutOfMemoryError:
        _LOG.info("no memory to time kernels for %s: the heuristic's is taken", problem)
        return _UNKNOWN
    finally:
        torch.cuda.empty_cache()  # the step's own allocations shall not be cut out of these
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] * _GAIN <= times[0] else 0
    seconds = time.monotonic() - started
    text = ", ".join(f"{kernel}: {1e6 * t:.0f}" for kernel, t in times.items())
    _LOG.info("kernel %d for %s; us: %s; found in %.1f s", chosen, problem, text, seconds)
    return chosen


class _Call:
    """The problem with random operands."""

    def __init__(self, problem: Problem) -> None:
        p = self.problem = problem
        numbers = torch.Generator("cuda").manual_seed(0)  # the user's own stay as they are
        self._a = _matrix(p, p.m, p.k, 0, numbers)
        self._b = _matrix(p, p.k, p.n, 1, numbers)
        self._bias = self._zeros(Epilogue.BIAS, p.n)
        self._aux = self._zeros(Epilogue.AUX, p.m, p.n)
        self._c = _random(p.out_dtype, (p.m, p.n), numbers) if p.adds else None

    def __call__(self, kernel: int) -> None:
        p = self.problem
        cublaslt.product(
            self._a,
            self._b,
            p.epilogue,
            out_dtype=p.out_dtype,
            bias=self._bias,
            aux=self._aux,
            c=self._c,
            choice=kernel,
        )

    def _zeros(self, part: Epilogue, *shape: int) -> Tensor | None:
        """What this part of the epilogue works on, if the problem has it."""
        has_part = part in self.problem.epilogue
        return self._a.new_zeros(shape, dtype=self.problem.out_dtype) if has_part else None

    def seconds(self, kernel: int, least: float) -> float:
        """Of one call, of as many as take about `least` seconds."""
        self(kernel)
        times = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        times[0].record()
        self(kernel)
        times[1].record()
        times[1].synchronize()
        calls = max(1, int(least / (1e-3 * times[0].elapsed_time(times[1]))))
        for _ in range(calls):
            self(kernel)
        times[2].record()
        times[2].synchronize()
        milliseconds: float = times[1].elapsed_time(times[2])
        return 1e-3 * milliseconds / calls


def _matrix(
    problem: Problem, rows: int, columns: int, which: int, numbers: torch.Generator
) -> Tensor:
    """a or b, as it lies in the problem."""
    stride = problem.strides[which]
    lies = (columns, stride) if problem.by_columns[which] else (rows, stride)
    x = _random(problem.dtype, lies, numbers)
    return x.t()[:rows] if problem.by_columns[which] else x[:, :columns]


def _random(dtype: torch.dtype, shape: tuple[int, int], numbers: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda", generator=numbers)


def _times(call: _Call) -> dict[int, float]:
    """Seconds of each kernel that was near the best, and of the first."""
    kernels = range(cublaslt.num_kernels(call.problem))
    first = {kernel: call.seconds(kernel, _FIRST_S) for kernel in kernels}
    near = [k for k in kernels if k == 0 or first[k] <= _NEAR * min(first.values())]
    if len(near) == 1:
        return {0: first[0]}
    rounds = [{k: call.seconds(k, _LATER_S) for k in near} for _ in range(_ROUNDS)]
    return {k: statistics.median(times[k] for times in rounds) for k in near}
