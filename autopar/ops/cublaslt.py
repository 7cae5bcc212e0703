"""Products of matrices with an elementwise function in the same kernel, its epilogue, by cuBLASLt.

    row-major:      out [m, n] = f(a [m, k] @ b [k, n])
    column-major:   out^T [n, m] = f(b^T [n, k] @ a^T [k, m]),    as cuBLASLt sees the same memory

Torch calls cuBLASLt without the epilogues that training needs: a GELU that also leaves its operand,
and its gradient. Here the library that torch has loaded is called by ctypes. What a call needs but
for addresses is made once for each shape. Names and numbers are those of cublasLt.h (CUDA 12, 13).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import torch
from torch import Tensor

from autopar.errors import InternalError


class Epilogue(IntFlag):
    """cublasLtEpilogue_t. GELU is that of the tanh formula."""

    BIAS = 4  # + bias [n]
    GELU = 32
    GELU_GRADIENT = 64  # times the slope of GELU at aux
    AUX = 128  # aux [m, n]: GELU's operand, an output of GELU and an input of its gradient


class _Desc(IntEnum):
    """cublasLtMatmulDescAttributes_t"""

    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    AUX_POINTER = 11
    AUX_LD = 12


class _Preference(IntEnum):
    """cublasLtMatmulPreferenceAttributes_t"""

    MAX_WORKSPACE_BYTES = 1
    MIN_ALIGNMENT_A_BYTES = 5  # then of B, C, D


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """What the choice of a kernel depends on. is_transposed, strides: of a and b, which lie by
    columns or by rows. align_bytes: to which all addresses are aligned."""

    device: int
    dtype: torch.dtype
    m: int
    k: int
    n: int
    is_transposed: tuple[bool, bool]
    strides: tuple[int, int]
    epilogue: Epilogue
    align_bytes: int


ALIGN_BYTES = 16  # at the least, as loads of tensor cores ask
_MOST_ALIGN_BYTES = 256
_TYPES = {torch.bfloat16: 14, torch.float16: 2}  # cudaDataType_t
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68  # cudaDataType_t, cublasComputeType_t
_WORKSPACE_BYTES = 32 << 20  # what torch allows it on an H100


def has_kernel(a: Tensor, b: Tensor, epilogue: Epilogue) -> bool:
    """Whether there is one for operands like these, fake ones, too: on the GPUs where epilogues
    were measured, for matrices that lie by rows or columns which start at aligned addresses."""
    if a.device.type != "cuda" or a.dtype not in _TYPES or a.dtype is not b.dtype:
        return False
    if torch.cuda.get_device_capability(a.device) != (9, 0) or not (_fits(a) and _fits(b)):
        return False
    if b.shape[1] * b.itemsize % ALIGN_BYTES:
        return False
    return _plan(_problem(a, b, epilogue, ALIGN_BYTES)) is not None


def product(
    a: Tensor, b: Tensor, epilogue: Epilogue, *, bias: Tensor | None = None, aux: Tensor
) -> Tensor:
    """f(a @ b): [m, n], by rows. aux: [m, n], by rows. Pre: has_kernel(a, b, epilogue)."""
    a, b = _aligned(a), _aligned(b)
    bias = None if bias is None else _aligned(bias.contiguous())
    out = a.new_empty(a.shape[0], b.shape[1])
    if aux.shape != out.shape or not aux.is_contiguous() or aux.data_ptr() % ALIGN_BYTES:
        raise InternalError(f"aux {tuple(aux.shape)} does not lie as {tuple(out.shape)} by rows")
    addresses = [t.data_ptr() for t in (a, b, aux, out)] + (
        [bias.data_ptr()] if bias is not None else []
    )
    problem = _problem(a, b, epilogue, math.gcd(_MOST_ALIGN_BYTES, *addresses))
    plan = _plan(problem)
    if plan is None:
        raise InternalError(f"cuBLASLt has no kernel for {problem}")
    plan(a, b, out, bias, aux)
    return out


def _fits(x: Tensor) -> bool:
    """Whether a matrix lies by rows or by columns, each of which starts at an aligned address."""
    is_dense = x.dim() == 2 and min(x.shape) > 0 and 1 in x.stride()
    return is_dense and max(x.stride()) * x.itemsize % ALIGN_BYTES == 0


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGN_BYTES == 0 else x.clone()


def _problem(a: Tensor, b: Tensor, epilogue: Epilogue, align_bytes: int) -> Problem:
    (m, k), n = a.shape, b.shape[1]
    lies = tuple(x.stride(1) != 1 for x in (a, b))
    strides = tuple(x.stride(int(t)) for x, t in zip((a, b), lies, strict=True))
    device = a.device.index if a.device.index is not None else torch.cuda.current_device()
    return Problem(
        device,
        a.dtype,
        m,
        k,
        n,
        (lies[0], lies[1]),
        (strides[0], strides[1]),
        epilogue,
        align_bytes,
    )


class _Plan:
    """The descriptions of one problem, and the kernel that cuBLASLt would take. Not for several
    threads: addresses are set before each call."""

    def __init__(self, problem: Problem, described: _Described, choice: _Choice) -> None:
        self._problem, self._described, self._choice = problem, described, choice

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, aux: Tensor) -> None:
        d, choice = self._described, self._choice
        d.point(None if bias is None else bias.data_ptr(), aux.data_ptr())
        workspace = out.new_empty(choice.workspace_bytes, dtype=torch.uint8)
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        a_T, b_T, out_T = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, out))
        _call(
            "cublasLtMatmul",
            _handle(self._problem.device),
            d.matmul,
            ctypes.byref(one),
            b_T,
            d.left,
            a_T,
            d.right,
            ctypes.byref(zero),
            out_T,
            d.out,
            out_T,
            d.out,
            ctypes.byref(choice.algo),
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_size_t(choice.workspace_bytes),
            ctypes.c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
        )


class _Described:
    """A problem in cuBLASLt's objects, which live as the process does. left: b^T, right: a^T."""

    def __init__(self, problem: Problem) -> None:
        (m, k, n), data = (problem.m, problem.k, problem.n), _TYPES[problem.dtype]
        a_by_columns, b_by_columns = problem.is_transposed
        a_stride, b_stride = problem.strides
        self.matmul = _made("cublasLtMatmulDescCreate", _COMPUTE_FLOAT32, _FLOAT32)
        self._set(_Desc.TRANSA, ctypes.c_int32(b_by_columns))
        self._set(_Desc.TRANSB, ctypes.c_int32(a_by_columns))
        self._set(_Desc.EPILOGUE, ctypes.c_int32(problem.epilogue))
        self._set(_Desc.AUX_LD, ctypes.c_int64(n))
        self.left = _layout(data, (k, n) if b_by_columns else (n, k), b_stride)
        self.right = _layout(data, (m, k) if a_by_columns else (k, m), a_stride)
        self.out = _layout(data, (n, m), n)
        self._has_bias = Epilogue.BIAS in problem.epilogue

    def point(self, bias: int | None, aux: int) -> None:
        """Addresses of what an epilogue reads or writes."""
        if self._has_bias:
            self._set(_Desc.BIAS_POINTER, ctypes.c_void_p(bias))
        self._set(_Desc.AUX_POINTER, ctypes.c_void_p(aux))

    def _set(self, attribute: _Desc, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call("cublasLtMatmulDescSetAttribute", self.matmul, attribute, ctypes.byref(value), size)


@functools.cache
def _plan(problem: Problem) -> _Plan | None:
    described = _Described(problem)
    # the heuristic reads off addresses how they are aligned
    described.point(problem.align_bytes, problem.align_bytes)
    preference = _made("cublasLtMatmulPreferenceCreate")
    wanted: Sequence[tuple[int, Any]] = (
        (_Preference.MAX_WORKSPACE_BYTES, ctypes.c_size_t(_WORKSPACE_BYTES)),
        *(
            (_Preference.MIN_ALIGNMENT_A_BYTES + i, ctypes.c_uint32(problem.align_bytes))
            for i in range(4)
        ),
    )
    for attribute, value in wanted:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cublasLtMatmulPreferenceSetAttribute"
        _call(name, preference, int(attribute), ctypes.byref(value), size)
    choice, found = _Choice(), ctypes.c_int()
    status = _library().cublasLtMatmulAlgoGetHeuristic(
        _handle(problem.device),
        described.matmul,
        described.left,
        described.right,
        described.out,
        described.out,
        preference,
        1,
        ctypes.byref(choice),
        ctypes.byref(found),
    )
    has_one = status == 0 and found.value == 1 and choice.status == 0
    return _Plan(problem, described, choice) if has_one else None


def _layout(data: int, shape: tuple[int, int], stride: int) -> ctypes.c_void_p:
    """Column-major."""
    rows, columns = map(ctypes.c_uint64, shape)
    return _made("cublasLtMatrixLayoutCreate", data, rows, columns, ctypes.c_int64(stride))


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    with torch.cuda.device(device):
        return _made("cublasLtCreate")


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that torch was built with and has loaded."""
    major = (torch.version.cuda or "").split(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


def _made(name: str, *args: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _call(name, ctypes.byref(made), *args)
    return made


def _call(name: str, *args: Any) -> None:
    status = getattr(_library(), name)(*args)
    if status:
        raise InternalError(f"{name} answered {status}, a cublasStatus_t")
