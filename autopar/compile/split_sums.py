"""Sums over rows that Inductor makes in the kernel that walks along rows, such as gradients of a
norm's weight and bias, end in one kernel of ours.

That kernel leaves a sum for each few rows. Inductor's code then adds them up by torch, one kernel
for each sum and one more where its type is narrow:

    buf1 = ws[0 * (512) * (768) : (0 + 1) * (512) * (768)].view(512, 768).sum(dim=0)
    buf2 = ws[1 * (512) * (768) : (1 + 1) * (512) * (768)].view(512, 768).sum(dim=0)
    ->
    buf1, buf2 = torch.ops.autopar.split_sums(ws, 2, 512, 768, torch.float32)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from autopar.compile.patches import replaced

_SUM = re.compile(
    r"(?P<name>\w+) = (?P<workspace>\w+)\[(?P<number>\d+) \* [^\]]*\]"
    r"\.view\((?P<rows>\d+), (?P<columns>\d+)\)\.sum\(dim=0\)"
    r"(?P<shape>\.view\(\[[\d, ]*\]\))?(?:\.to\((?P<dtype>torch\.\w+)\))?"
)


@contextlib.contextmanager
def joined_sums() -> Iterator[None]:
    """For what Inductor compiles inside for GPUs. Lines of another form stay as they are."""
    from torch._inductor.codegen.simd import SIMDScheduling
    from torch._inductor.virtualized import V

    scheduling: Any = SIMDScheduling
    theirs = scheduling._codegen_mix_order_reduction

    def ours(self: Any, *nodes: Any) -> None:
        lines = V.graph.wrapper_code.lines
        before = len(lines)
        theirs(self, *nodes)
        lines[before:] = join(lines[before:])

    with replaced(scheduling, "_codegen_mix_order_reduction", ours, "split sums are joined"):
        yield


def join(lines: Sequence[Any]) -> list[Any]:
    """Lines of Inductor's code for one kernel, strings and others. O(lines)."""
    found = [_SUM.fullmatch(line) if isinstance(line, str) else None for line in lines]
    sums = [match for match in found if match is not None]
    alike = {match.group("workspace", "rows", "columns", "dtype") for match in sums}
    if len(alike) != 1 or [int(match["number"]) for match in sums] != list(range(len(sums))):
        return list(lines)
    ((workspace, rows, columns, dtype),) = alike
    names = "".join(f"{match['name']}, " for match in sums)
    arguments = f"{workspace}, {len(sums)}, {rows}, {columns}, {dtype or torch.float32}"
    joined = [f"{names}= torch.ops.autopar.split_sums({arguments})"]
    joined += [f"{m['name']} = {m['name']}{m['shape']}" for m in sums if m["shape"]]
    first = found.index(sums[0])
    left = [line for line, match in zip(lines[first:], found[first:], strict=True) if not match]
    return [*lines[:first], *joined, *left]
