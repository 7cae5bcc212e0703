"""Random numbers that are a hash of the global element index: dropout, uniform, normal, randint.

A number depends on (seed, op_id, global row, global column) and on nothing else, so that every
sharding, every pipeline cut and every recomputation draws the same one, and nothing is saved for
backward. Rows count on from one microbatch to the next: where dim 0 is the batch's, microbatches
draw together what the whole batch would draw. The hash is two rounds of a 32-bit mixer (the
"lowbias32" family, C. Wellons, "Prospecting for Hash Functions", 2018; constants from its low-bias
search), written in int32 ATen operators that wrap alike in eager, C++ and Triton code:

    bits(row, col) = mix(mix(row ^ key0) ^ mix(col + key1))

with key = two words hashed from (seed, op_id). One `mix` per row, one per column, one per element.

    dropout   keeps where bits < threshold(p)
    uniform   k / 2^d in [0, 1), k the d highest bits, d the digits of the dtype's significand
    normal    sqrt(2) erfinv(x), x = (2k + 1) / 2^d in (-1, 1), k signed: |normal| < 5.4 in float32
    randint   low + floor(bits (high - low) / 2^32): a value's probability is off by 2^-32 at most

float64 has 53 digits, from two words. erfinv is the backend's own; all other steps are exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

SHIFTS = (16, 15, 15)
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
_KEY_SALTS = (0x9E3779B9, 0x85EBCA6B)  # golden ratio; murmur3 finaliser: any two distinct odd words

_SECOND_WORD = 1 << 31  # added to op_id: the low digits of float64
# Significant binary digits that are drawn; normals of the half precisions are rounded from float32.
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

define(
    "dropout(Tensor x, Tensor seed, int op_id, float p, int[] sizes, int[] local_sizes,"
    " int[] offsets, int row_atoms) -> Tensor"
)
_GEOMETRY = "Tensor seed, int op_id, int[] sizes, int[] local_sizes, int[] offsets"
define(f"uniform({_GEOMETRY}, ScalarType dtype) -> Tensor")
define(f"normal({_GEOMETRY}, ScalarType dtype) -> Tensor")
define(f"randint({_GEOMETRY}, int low, int high, ScalarType dtype) -> Tensor")


define("random_keys(Tensor seed, int[] op_ids) -> Tensor")  # int32[op_ids, 2]
define(  # dropout with the keys of one row of random_keys: one operator for a compiler
    "keyed_dropout(Tensor x, Tensor seed, Tensor keys, int row, float p, int[] sizes,"
    " int[] local_sizes, int[] offsets, int row_atoms) -> Tensor"
)


class _Operators(Protocol):
    """What `mix` asks of a word."""

    def __mul__(self, other: Any) -> Self: ...
    def __xor__(self, other: Any) -> Self: ...
    def __and__(self, other: Any) -> Self: ...
    def __rshift__(self, other: Any) -> Self: ...


Word = TypeVar("Word", bound=_Operators)
Keys = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(seed, op_id) -> two words, int32[1] each: what `make_keys` makes."""


def seed_tensor(seed: int, microbatch: int, device: torch.device | None = None) -> Tensor:
    """int32[2]: what the random operators of one microbatch read. Every reference execution uses it
    too. seed: of the step, any 64-bit integer."""
    word = mix_int(mix_int(seed) + mix_int(seed >> 32))
    words = [wrapped(word), microbatch]
    if device is None or device.type != "cuda":
        return torch.tensor(words, dtype=torch.int32, device=device)
    pinned = torch.tensor(words, dtype=torch.int32, pin_memory=True)
    return pinned.to(device, non_blocking=True)  # from other memory the copy waits for the device


def counter_dropout(
    x: Tensor,
    seed: Tensor,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    row_atoms: int,
    keys: Keys | None = None,
) -> Tensor:
    """Plain ATen body of `autopar::dropout`, also its decomposition for a compiler.

    x:           any shape; viewed as `local_sizes`, the atoms (factors) of its dims, major first.
    seed:        int32[2]: of the step, and the number of the microbatch.
    sizes:       global size of every atom; offsets: global start of this shard in every atom.
    row_atoms:   row = linear global index over the first `row_atoms` atoms, column = over the rest.
    Rows and columns count modulo 2^32. Kept values are scaled by 1 / (1 - p). Linear in x, hence
    its own backward. O(elements).
    """
    if p == 0.0:
        return x.clone(memory_format=torch.contiguous_format)
    if p >= 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    atoms = tuple(zip(sizes, local_sizes, offsets, strict=True))
    keep = (hashed_bits(seed, op_id, atoms, row_atoms, keys) < threshold(p)).reshape(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0).contiguous()


def keyed_dropout(
    x: Tensor,
    seed: Tensor,
    keys: Tensor,
    row: int,
    p: float,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    row_atoms: int,
) -> Tensor:
    """`counter_dropout` whose keys are a row of int32[rows, 2]."""

    def key(_seed: Tensor, _op_id: int) -> tuple[Tensor, Tensor]:
        return keys[row, :1], keys[row, 1:]

    return counter_dropout(x, seed, 0, p, sizes, local_sizes, offsets, row_atoms, key)


def counter_uniform(
    seed: Tensor,
    op_id: int,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    dtype: torch.dtype,
    keys: Keys | None = None,
) -> Tensor:
    """Body of `autopar::uniform`: [0, 1). sizes, local_sizes, offsets: of each dim of the result,
    global, of this shard, and where it starts."""
    digits = _DIGITS[dtype]
    if dtype is torch.float64:
        high = _dim_bits(seed, op_id, sizes, local_sizes, offsets, keys)
        low = _dim_bits(seed, op_id + _SECOND_WORD, sizes, local_sizes, offsets, keys)
        count = _logical_shift(high, 5).double() * 2.0**26 + _logical_shift(low, 6).double()
        return count * 2.0**-digits
    bits = _dim_bits(seed, op_id, sizes, local_sizes, offsets, keys)
    return _logical_shift(bits, 32 - digits).to(dtype) * 2.0**-digits


def counter_normal(
    seed: Tensor,
    op_id: int,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    dtype: torch.dtype,
    keys: Keys | None = None,
) -> Tensor:
    """Body of `autopar::normal`: mean 0, variance 1, by inversion."""
    if dtype is torch.float64:
        high = _dim_bits(seed, op_id, sizes, local_sizes, offsets, keys)
        low = _dim_bits(seed, op_id + _SECOND_WORD, sizes, local_sizes, offsets, keys)
        count = (high >> 5).double() * 2.0**26 + _logical_shift(low, 6).double()
        return torch.erfinv(count * 2.0**-52 + 2.0**-53) * math.sqrt(2.0)
    bits = _dim_bits(seed, op_id, sizes, local_sizes, offsets, keys)
    middle = (bits >> 8).float() * 2.0**-23 + 2.0**-24
    return (torch.erfinv(middle) * math.sqrt(2.0)).to(dtype)


def counter_randint(
    seed: Tensor,
    op_id: int,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    low: int,
    high: int,
    dtype: torch.dtype,
    keys: Keys | None = None,
) -> Tensor:
    """Body of `autopar::randint`: low <= value < high. Pre: high - low <= 2^31."""
    bits = _dim_bits(seed, op_id, sizes, local_sizes, offsets, keys)
    word = bits.to(torch.int64) & 0xFFFFFFFF
    return ((word * (high - low) >> 32) + low).to(dtype)


def hashed_bits(
    seed: Tensor,
    op_id: int,
    atoms: Sequence[tuple[int, int, int]],
    row_atoms: int,
    keys: Keys | None = None,
) -> Tensor:
    """int32[local rows, local columns]. atoms: (global size, local size, offset) of each. keys:
    made before; None to make them here."""
    key0, key1 = (keys or make_keys)(seed, op_id)
    rows = _linear_index(atoms[:row_atoms], seed.device)
    cols = _linear_index(atoms[row_atoms:], seed.device)
    microbatch = seed.narrow(0, 1, 1)
    if row_atoms:
        rows = rows + microbatch * wrapped(math.prod([size for size, _, _ in atoms[:row_atoms]]))
    else:
        cols = cols + microbatch * wrapped(math.prod([size for size, _, _ in atoms]))
    return mix(mix(rows ^ key0).unsqueeze(1) ^ mix(cols + key1).unsqueeze(0))


def _dim_bits(
    seed: Tensor,
    op_id: int,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    keys: Keys | None = None,
) -> Tensor:
    """int32 of the local shape; the columns are the last dim."""
    atoms = tuple(zip(sizes, local_sizes, offsets, strict=True))
    bits = hashed_bits(seed, op_id, atoms, max(len(atoms) - 1, 0), keys)
    return bits.reshape(list(local_sizes))


def mix(x: Word) -> Word:
    """A bijection of int32 whose every output bit depends on every input bit. x: a tensor, or
    anything else that has its operators."""
    x = x ^ _logical_shift(x, SHIFTS[0])
    x = x * wrapped(MULTIPLIERS[0])
    x = x ^ _logical_shift(x, SHIFTS[1])
    x = x * wrapped(MULTIPLIERS[1])
    return x ^ _logical_shift(x, SHIFTS[2])


def mix_int(x: int) -> int:
    """:func:`mix` of a Python integer, as an unsigned 32-bit word."""
    x &= 0xFFFFFFFF
    x ^= x >> SHIFTS[0]
    x = x * MULTIPLIERS[0] & 0xFFFFFFFF
    x ^= x >> SHIFTS[1]
    x = x * MULTIPLIERS[1] & 0xFFFFFFFF
    return x ^ (x >> SHIFTS[2])


def make_keys(seed: Tensor, op_id: int) -> tuple[Tensor, Tensor]:
    """Two int32[1] words. They agree for two (seed, op_id) pairs only if both 32-bit hashes do."""
    return _keys(seed, *salts_of(op_id))


def _random_keys(seed: Tensor, op_ids: Sequence[int]) -> Tensor:
    salts = _salts(tuple(op_ids), seed.device)
    return torch.stack(_keys(seed, salts[0], salts[1]), dim=1)


def _keys(seed: Tensor, first: int | Tensor, second: int | Tensor) -> tuple[Tensor, Tensor]:
    word = seed.narrow(0, 0, 1)
    return mix(mix(word) ^ first), mix(mix(word + second) ^ first)


def salts_of(op_id: int) -> tuple[int, int]:
    first, second = (wrapped(mix_int(mix_int(op_id) + salt)) for salt in _KEY_SALTS)
    return first, second


@functools.cache
def _salts(op_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """int32[2, op_ids]; kept, as bringing it to the device waits for the device."""
    return torch.tensor([salts_of(i) for i in op_ids], dtype=torch.int32, device=device).t()


def _linear_index(atoms: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """int32[product of local sizes]: global linear index over atoms of (global, local, offset)."""
    index = torch.zeros(1, dtype=torch.int32, device=device)
    stride = math.prod([size for size, _, _ in atoms])
    for size, local, offset in atoms:
        stride //= max(size, 1)
        steps = torch.arange(local, dtype=torch.int32, device=device) * wrapped(stride)
        index = (index.unsqueeze(1) + (steps + wrapped(offset * stride))).reshape(-1)
    return index


def _logical_shift(x: Word, bits: int) -> Word:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def wrapped(word: int) -> int:
    """The int32 with the same low 32 bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def threshold(p: float) -> int:
    """Bits below it are kept."""
    return min(int((1.0 - p) * 2**32), 2**32 - 1) - 2**31


def _dropout_fake(x: Tensor, *_args: Any) -> Tensor:
    return x.new_empty(x.shape)


def random_op_ids(target: Any, args: Sequence[Any]) -> tuple[int, ...]:
    """Those for which a call of one of our random operators needs keys; none for other calls."""
    if target is torch.ops.autopar.dropout.default:
        return (args[2],)
    if target is torch.ops.autopar.sdpa_dropout.default:
        return (args[6],)
    if target is torch.ops.autopar.sdpa_dropout_backward.default:
        return (args[9],)
    if target in _CREATING:
        return (args[1], args[1] + _SECOND_WORD)
    return ()


def _creation_fake(
    seed: Tensor,
    _op_id: int,
    _sizes: Sequence[int],
    local_sizes: Sequence[int],
    *rest: Any,
) -> Tensor:
    return seed.new_empty(list(local_sizes), dtype=rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, seed, *ctx.constants = inputs
    ctx.save_for_backward(seed)


def _dropout_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    grad_x = torch.ops.autopar.dropout(grad, seed, *ctx.constants)
    return (grad_x, None, *(None for _ in ctx.constants))


LIBRARY.impl("dropout", counter_dropout, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::dropout", _dropout_fake, lib=LIBRARY)
torch.library.register_autograd(
    "autopar::dropout", _dropout_grad, setup_context=_setup_context, lib=LIBRARY
)
LIBRARY.impl("keyed_dropout", keyed_dropout, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::keyed_dropout", _dropout_fake, lib=LIBRARY)
LIBRARY.impl("random_keys", _random_keys, "CompositeExplicitAutograd")
torch.library.register_fake(
    "autopar::random_keys",
    lambda seed, op_ids: seed.new_empty((len(op_ids), 2)),
    lib=LIBRARY,
)
for _name, _body in (
    ("uniform", counter_uniform),
    ("normal", counter_normal),
    ("randint", counter_randint),
):
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autopar::{_name}", _creation_fake, lib=LIBRARY)
_CREATING = frozenset(
    getattr(torch.ops.autopar, name).default for name in ("uniform", "normal", "randint")
)
