"""Which lines of Inductor's code become one call."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.codegen.simd import SIMDScheduling

from autopar.compile.split_sums import join, joined_sums


def line(number: int, name: str, rest: str = "", rows: int = 512, op: str = "sum") -> str:
    stride = f"({rows}) * (768)"
    where = f"{number} * {stride} : ({number} + 1) * {stride}"
    return f"{name} = ws_3[{where}].view({rows}, 768).{op}(dim=0){rest}"


CALL = "torch.ops.autopar.split_sums(ws_3"


def test_two_sums_are_one_call() -> None:
    lines = ["kernel.run()", line(0, "buf7"), line(1, "buf9")]
    assert join(lines) == ["kernel.run()", f"buf7, buf9, = {CALL}, 2, 512, 768, torch.float32)"]


def test_types_and_shapes_are_kept() -> None:
    lines = [line(0, "buf7", ".view([1, 768]).to(torch.bfloat16)"), "del ws_3"]
    call = f"buf7, = {CALL}, 1, 512, 768, torch.bfloat16)"
    assert join(lines) == [call, "buf7 = buf7.view([1, 768])", "del ws_3"]


@pytest.mark.parametrize(
    "lines",
    [
        ["kernel.run()", object()],
        [line(0, "buf7", op="amax"), line(1, "buf9")],
        [line(0, "buf7"), line(1, "buf9", ".to(torch.bfloat16)")],
        [line(0, "buf7"), line(1, "buf9", rows=64)],
        [line(0, "buf7", ".abs()")],
        [line(0, "buf7", rows=512).replace("512", "s0")],
    ],
)
def test_other_lines_stay(lines: list[object]) -> None:
    assert join(lines) == lines


def test_inductor_is_left_as_it_was() -> None:
    before, tag = vars(SIMDScheduling).copy(), torch.compiler.config.cache_key_tag
    with joined_sums():
        assert vars(SIMDScheduling) != before
        assert torch.compiler.config.cache_key_tag != tag
    assert vars(SIMDScheduling) == before
    assert torch.compiler.config.cache_key_tag == tag
