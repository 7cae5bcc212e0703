"""Dropout as one loop of Inductor: written out as ATen operators it is about seventy nodes each
way, most of what there is to compile in a model that has it.

Bits are those of `ops.random.counter_dropout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.ops.random import mix, threshold, wrapped


def dropout(
    x: Any,
    seed: Any,
    keys: Any,
    row: int,
    p: float,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    offsets: Sequence[int],
    row_atoms: int,
) -> Any:
    """Lowering of `autopar::keyed_dropout`: tensors are Inductor's."""
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import ops

    value_of, seed_of, key_of = x.make_loader(), seed.make_loader(), keys.make_loader()
    shape, dtype = [int(size) for size in x.get_size()], x.get_dtype()
    atoms = tuple(zip(sizes, local_sizes, offsets, strict=True))
    whole = [math.prod(s for s, _, _ in part) for part in (atoms[:row_atoms], atoms)]

    def element(index: Sequence[Any]) -> Any:
        linear = sum(i * math.prod(shape[d + 1 :]) for d, i in enumerate(index))
        after = math.prod(size for _, size, _ in atoms[row_atoms:])
        rows = _global_index(linear, after, atoms[:row_atoms])
        cols = _global_index(linear, 1, atoms[row_atoms:])
        microbatch = _Word(seed_of([1]))
        if row_atoms:
            rows = rows + microbatch * wrapped(whole[0])
        else:
            cols = cols + microbatch * wrapped(whole[1])
        first, second = (_Word(key_of([row, word])) for word in (0, 1))
        bits = mix(mix(rows ^ first) ^ mix(cols + second))
        scaled = ops.mul(value_of(index), ops.constant(1.0 / (1.0 - p), dtype))
        keep = ops.lt(bits.value, ops.constant(threshold(p), torch.int32))
        return ops.where(keep, scaled, ops.constant(0.0, dtype))

    return Pointwise.create(
        device=x.get_device(), dtype=dtype, inner_fn=element, ranges=x.get_size()
    )


def _global_index(linear: Any, inner: int, atoms: Sequence[tuple[int, int, int]]) -> _Word:
    """The linear global index over atoms of (global, local, offset), of the element whose
    local index is `linear`; `inner` elements come after the atoms."""
    from torch._inductor.virtualized import ops
    from torch.utils._sympy.functions import ModularIndexing

    found, start, stride = 0, 0, 1
    for size, local, offset in reversed(atoms):
        found += ModularIndexing(linear, inner, local) * wrapped(stride)
        start += offset * stride
        inner, stride = inner * local, stride * size
    return _Word(ops.index_expr(found, torch.int32)) + wrapped(start)


@dataclass(frozen=True, slots=True)
class _Word:
    """An int32 of Inductor's loops with the operators of a tensor."""

    value: Any

    def __add__(self, other: _Word | int) -> _Word:
        return self._apply("add", other)

    def __mul__(self, other: _Word | int) -> _Word:
        return self._apply("mul", other)

    def __xor__(self, other: _Word | int) -> _Word:
        return self._apply("bitwise_xor", other)

    def __and__(self, other: _Word | int) -> _Word:
        return self._apply("bitwise_and", other)

    def __rshift__(self, other: int) -> _Word:
        return self._apply("bitwise_right_shift", other)

    def _apply(self, name: str, other: _Word | int) -> _Word:
        from torch._inductor.virtualized import ops

        operand = other.value if isinstance(other, _Word) else ops.constant(other, torch.int32)
        return _Word(getattr(ops, name)(self.value, operand))
