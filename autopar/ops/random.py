"""`autopar::dropout`: dropout whose mask is a hash of the global element index.

The mask depends on (seed, op_id, global row, global column) and on nothing else, so that every
sharding, every pipeline cut and every recomputation draws the same one, and nothing is saved for
backward. The hash is two rounds of a 32-bit mixer (the "lowbias32" family, C. Wellons, "Prospecting
for Hash Functions", 2018; constants from its low-bias search), written in int32 ATen operators that
wrap alike in eager, C++ and Triton code:

    bits(row, col) = mix(mix(row ^ key0) ^ mix(col + key1))        kept where bits < threshold(p)

with key = two words hashed from (seed, op_id). One `mix` per row, one per column, one per element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ops.library import LIBRARY, define

_SHIFTS = (16, 15, 15)
_MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
_KEY_SALTS = (0x9E3779B9, 0x85EBCA6B)  # golden ratio; murmur3 finaliser: any two distinct odd words

define(
    "dropout(Tensor x, Tensor seed, int op_id, float p, int[] sizes, int[] local_sizes,"
    " int[] offsets, int row_atoms) -> Tensor"
)


def counter_dropout(
    x: Tensor,
    seed: Tensor,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    row_atoms: int,
) -> Tensor:
    """Plain ATen body of `autopar::dropout`, also its decomposition for a compiler.

    x:           any shape; viewed as `local_sizes`, the atoms (factors) of its dims, major first.
    seed:        int32[1].
    sizes:       global size of every atom; offsets: global start of this shard in every atom.
    row_atoms:   row = linear global index over the first `row_atoms` atoms, column = over the rest.
    Rows and columns count modulo 2^32. Kept values are scaled by 1 / (1 - p). Linear in x, hence
    its own backward. O(elements).
    """
    if p == 0.0:
        return x.clone(memory_format=torch.contiguous_format)
    if p >= 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    key0, key1 = _keys(seed, op_id)
    atoms = tuple(zip(sizes, local_sizes, offsets, strict=True))
    rows = _linear_index(atoms[:row_atoms], x.device)
    cols = _linear_index(atoms[row_atoms:], x.device)
    bits = mix(mix(rows ^ key0).unsqueeze(1) ^ mix(cols + key1).unsqueeze(0))
    keep = (bits < _threshold(p)).reshape(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0).contiguous()


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 whose every output bit depends on every input bit."""
    x = x ^ _logical_shift(x, _SHIFTS[0])
    x = x * _signed(_MULTIPLIERS[0])
    x = x ^ _logical_shift(x, _SHIFTS[1])
    x = x * _signed(_MULTIPLIERS[1])
    return x ^ _logical_shift(x, _SHIFTS[2])


def mix_int(x: int) -> int:
    """:func:`mix` of a Python integer, as an unsigned 32-bit word."""
    x &= 0xFFFFFFFF
    x ^= x >> _SHIFTS[0]
    x = x * _MULTIPLIERS[0] & 0xFFFFFFFF
    x ^= x >> _SHIFTS[1]
    x = x * _MULTIPLIERS[1] & 0xFFFFFFFF
    return x ^ (x >> _SHIFTS[2])


def _keys(seed: Tensor, op_id: int) -> tuple[Tensor, Tensor]:
    """Two int32[1] words. They agree for two (seed, op_id) pairs only if both 32-bit hashes do."""
    first, second = (_signed(mix_int(mix_int(op_id) + salt)) for salt in _KEY_SALTS)
    return mix(mix(seed) ^ first), mix(mix(seed + second) ^ first)


def _linear_index(atoms: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """int32[product of local sizes]: global linear index over atoms of (global, local, offset)."""
    index = torch.zeros(1, dtype=torch.int32, device=device)
    stride = math.prod(size for size, _, _ in atoms)
    for size, local, offset in atoms:
        stride //= max(size, 1)
        steps = torch.arange(local, dtype=torch.int32, device=device) * _signed(stride)
        index = (index.unsqueeze(1) + (steps + _signed(offset * stride))).reshape(-1)
    return index


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    """The int32 with the same low 32 bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _threshold(p: float) -> int:
    return min(int((1.0 - p) * 2**32), 2**32 - 1) - 2**31


def _dropout_fake(x: Tensor, *_args: Any) -> Tensor:
    return x.new_empty(x.shape)


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
