"""Products of matrices by a kernel of cuBLASLt of one's own choice, with what follows them in it.

    row-major:      out [m, n] = f(a [m, k] @ b [k, n] + c [m, n])
    column-major:   out^T [n, m] = f(b^T [n, k] @ a^T [k, m] + c^T),    as cuBLASLt sees this memory

Torch takes the kernel that cuBLASLt's heuristic puts first, copies c to out before it, and has no
epilogue f that training needs: a GELU that also leaves its operand, and its gradient. Here the
library that torch has loaded is called by ctypes. What a call needs but for addresses is made once
for each problem. Names and numbers are those of cublasLt.h (CUDA 12, 13).
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import Any

import torch
from torch import Tensor

from autopar.errors import InternalError


class Epilogue(IntFlag):
    """cublasLtEpilogue_t. GELU is that of the tanh formula."""

    NONE = 1
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
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class _Found(ctypes.Structure):
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
    """What cuBLASLt's kernels are found by. by_columns, strides: of a and b, whose columns or rows
    are `strides` elements apart. out_dtype: of the result; a bias and aux have it, too.
    align_bytes: to which all addresses are aligned."""

    device: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    m: int
    k: int
    n: int
    by_columns: tuple[bool, bool]
    strides: tuple[int, int]
    epilogue: Epilogue
    align_bytes: int
    adds: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


NUM_KERNELS = 8  # that are asked for, the heuristic's best first
_LEAST_ALIGN_BYTES = 16  # of an address, as loads of tensor cores ask
_MOST_ALIGN_BYTES = 256
_TYPES = {torch.bfloat16: 14, torch.float16: 2, torch.float32: 0}  # cudaDataType_t
_NARROW = (torch.bfloat16, torch.float16)
_COMPUTE_FLOAT32 = 68  # cublasComputeType_t
_SUMS_IN_FLOAT32 = 2  # cublasLtReductionScheme_t: of the parts of a sum that is split
_WORKSPACE_BYTES = 32 << 20  # what torch allows on an H100


def problem_of(
    a: Tensor,
    b: Tensor,
    epilogue: Epilogue,
    out_dtype: torch.dtype | None = None,
    *,
    adds: bool = False,
) -> Problem | None:
    """Of operands like these, maybe fake ones, at addresses as the allocator gives them; None where
    no kernel takes them: other devices than that where such calls were measured, and matrices that
    do not lie by rows or columns which start at aligned addresses."""
    if a.device.type != "cuda" or torch.version.cuda is None:
        return None
    if a.dtype not in _NARROW or a.dtype is not b.dtype or not (_fits(a) and _fits(b)):
        return None
    if torch.cuda.get_device_capability(a.device) != (9, 0):
        return None
    wanted = out_dtype or a.dtype
    if b.shape[1] * wanted.itemsize % _LEAST_ALIGN_BYTES:
        return None
    problem = _problem(a, b, epilogue, wanted, _MOST_ALIGN_BYTES, adds)
    least = replace(problem, align_bytes=_LEAST_ALIGN_BYTES)
    return problem if _plans(problem) and _plans(least) else None


def num_kernels(problem: Problem) -> int:
    return len(_plans(problem))


def product(
    a: Tensor,
    b: Tensor,
    epilogue: Epilogue,
    *,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    aux: Tensor | None = None,
    c: Tensor | None = None,
    choice: int = 0,
) -> Tensor:
    """f(a @ b + c): [m, n], by rows. aux, c: [m, n], by rows. choice: which of `num_kernels`; the
    first where addresses are less aligned than the allocator's. Pre: `problem_of` knows the
    operands."""
    a, b = _aligned(a), _aligned(b)
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    if bias is not None:
        bias = _aligned(bias.contiguous())
    for name, x in (("aux", aux), ("c", c)):
        if x is not None and (x.shape != out.shape or not x.is_contiguous()):
            raise InternalError(f"{name} {tuple(x.shape)} is not {tuple(out.shape)} by rows")
    if aux is not None and Epilogue.GELU_GRADIENT in epilogue:
        aux = _aligned(aux)
    c = None if c is None else _aligned(c)
    given = [t for t in (a, b, out, bias, aux, c) if t is not None]
    align_bytes = math.gcd(_MOST_ALIGN_BYTES, *(t.data_ptr() for t in given))
    problem = _problem(a, b, epilogue, out.dtype, align_bytes, c is not None)
    plans = _plans(problem)
    index = choice if align_bytes == _MOST_ALIGN_BYTES else 0
    if index >= len(plans):
        raise InternalError(f"cuBLASLt has {len(plans)} kernels, not {index + 1}, for {problem}")
    with torch.cuda.device(problem.device):
        plans[index](a, b, out, bias, aux, c)
    return out


def version() -> str:
    """Of the library and of what it is asked for: on these its lists of kernels depend."""
    library = _library()
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    number = library.cublasLtGetVersion()
    return f"cuBLASLt {number}: {NUM_KERNELS}, {_WORKSPACE_BYTES}, {_SUMS_IN_FLOAT32}"


def _fits(x: Tensor) -> bool:
    """Whether a matrix lies by rows or by columns, each of which starts at an aligned address and
    ends before the next."""
    if x.dim() != 2 or 0 in x.shape or 1 not in x.stride():
        return False
    along = int(x.stride(1) == 1)  # the dim along which elements follow one another
    stride = x.stride(1 - along)
    return stride >= x.shape[along] and stride * x.itemsize % _LEAST_ALIGN_BYTES == 0


def _aligned(x: Tensor) -> Tensor:
    """The same strides at an aligned address."""
    if x.data_ptr() % _LEAST_ALIGN_BYTES == 0:
        return x
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def _problem(
    a: Tensor,
    b: Tensor,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    align_bytes: int,
    adds: bool,
) -> Problem:
    (m, k), n = a.shape, b.shape[1]
    by_columns = a.stride(1) != 1, b.stride(1) != 1
    strides = a.stride(int(by_columns[0])), b.stride(int(by_columns[1]))
    device = torch.cuda.current_device() if a.device.index is None else a.device.index
    sizes = m, k, n
    return Problem(
        device, a.dtype, out_dtype, *sizes, by_columns, strides, epilogue, align_bytes, adds
    )


class _Plan:
    """One kernel for one problem. Not for several threads: addresses are set before each call."""

    def __init__(self, device: int, described: _Described, choice: _Found) -> None:
        self._device, self._described, self._choice = device, described, choice

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        bias: Tensor | None,
        aux: Tensor | None,
        c: Tensor | None,
    ) -> None:
        of, choice = self._described, self._choice
        of.point(*(None if x is None else x.data_ptr() for x in (bias, aux)))
        workspace = out.new_empty(choice.workspace_bytes, dtype=torch.uint8)
        alpha, beta = ctypes.c_float(1.0), ctypes.c_float(c is not None)
        added = out if c is None else c  # not read where beta is 0
        left, right, third, made = (ctypes.c_void_p(x.data_ptr()) for x in (b, a, added, out))
        _call(
            "cublasLtMatmul",
            _handle(self._device),
            of.matmul,
            ctypes.byref(alpha),
            left,
            of.left,
            right,
            of.right,
            ctypes.byref(beta),
            third,
            of.out,
            made,
            of.out,
            ctypes.byref(choice.algo),
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_size_t(choice.workspace_bytes),
            ctypes.c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
        )


class _Described:
    """A problem in cuBLASLt's objects, which live as the process does. left: b^T, right: a^T."""

    def __init__(self, problem: Problem) -> None:
        m, k, n = problem.m, problem.k, problem.n
        data, made = _TYPES[problem.dtype], _TYPES[problem.out_dtype]
        a_by_columns, b_by_columns = problem.by_columns
        a_stride, b_stride = problem.strides
        self._epilogue = problem.epilogue
        self.matmul = _made("cublasLtMatmulDescCreate", _COMPUTE_FLOAT32, _TYPES[torch.float32])
        self._set(_Desc.TRANSA, ctypes.c_int32(b_by_columns))
        self._set(_Desc.TRANSB, ctypes.c_int32(a_by_columns))
        self._set(_Desc.EPILOGUE, ctypes.c_int32(problem.epilogue))
        if Epilogue.AUX in problem.epilogue:
            self._set(_Desc.AUX_LD, ctypes.c_int64(n))
        self.left = _layout(data, (k, n) if b_by_columns else (n, k), b_stride)
        self.right = _layout(data, (m, k) if a_by_columns else (k, m), a_stride)
        self.out = _layout(made, (n, m), n)

    def point(self, bias: int | None, aux: int | None) -> None:
        """Addresses of what an epilogue reads or writes."""
        if Epilogue.BIAS in self._epilogue:
            self._set(_Desc.BIAS_POINTER, ctypes.c_void_p(bias))
        if Epilogue.AUX in self._epilogue:
            self._set(_Desc.AUX_POINTER, ctypes.c_void_p(aux))

    def _set(self, attribute: _Desc, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call(
            "cublasLtMatmulDescSetAttribute", self.matmul, int(attribute), ctypes.byref(value), size
        )


@functools.cache
def _plans(problem: Problem) -> tuple[_Plan, ...]:
    """For every kernel that cuBLASLt has, its best first."""
    described = _Described(problem)
    # the heuristic reads off addresses how they are aligned
    described.point(problem.align_bytes, problem.align_bytes)
    align = ctypes.c_uint32(problem.align_bytes)
    preference = _preference(
        (_Preference.MAX_WORKSPACE_BYTES, ctypes.c_size_t(_WORKSPACE_BYTES)),
        (_Preference.REDUCTION_SCHEME_MASK, ctypes.c_uint32(_SUMS_IN_FLOAT32)),
        (_Preference.MIN_ALIGNMENT_A_BYTES, align),
        (_Preference.MIN_ALIGNMENT_B_BYTES, align),
        (_Preference.MIN_ALIGNMENT_C_BYTES, align),
        (_Preference.MIN_ALIGNMENT_D_BYTES, align),
    )
    choices, found = (_Found * NUM_KERNELS)(), ctypes.c_int()
    status = _library().cublasLtMatmulAlgoGetHeuristic(
        _handle(problem.device),
        described.matmul,
        described.left,
        described.right,
        described.out,
        described.out,
        preference,
        NUM_KERNELS,
        choices,
        ctypes.byref(found),
    )
    _call("cublasLtMatmulPreferenceDestroy", preference)
    if status:  # it knows none
        return ()
    able = [choice for choice in choices[: found.value] if choice.status == 0]
    return tuple(_Plan(problem.device, described, choice) for choice in able)


def _preference(*wanted: tuple[_Preference, Any]) -> ctypes.c_void_p:
    made = _made("cublasLtMatmulPreferenceCreate")
    for attribute, value in wanted:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cublasLtMatmulPreferenceSetAttribute"
        _call(name, made, int(attribute), ctypes.byref(value), size)
    return made


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
